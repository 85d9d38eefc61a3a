"""Optimizer states in eight bits: block-wise dynamic quantisation (Dettmers et al., ICLR 2022, arXiv:2110.02861)."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 256


@cache
def code_book(signed: bool) -> Float[Tensor, "256"]:
    """256 values in [-1, 1] (in [0, 1] unsigned), ascending: as many to every decade as its share of precision asks for.

    The decade below :math:`10^{-e}`, e = 0..6, holds :math:`2^{6-e}` magnitudes of each sign (twice as many unsigned), midpoints of
    a linear scale from a tenth of the decade to its end; 0 and 1 complete the book.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (6 - e) * (1 if signed else 2) + 1, dtype=torch.float64)
        magnitudes = ((edges[1:] + edges[:-1]) / 2 * 10.0**-e).tolist()
        values += magnitudes + ([-m for m in magnitudes] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantise(x: Tensor, signed: bool) -> tuple[UInt8[Tensor, " entries"], Float[Tensor, " blocks"]]:
    """Store a tensor as the nearest codes of its blocks, each divided by its largest magnitude.

    Args:
        x: any shape, float.
        signed: whether entries may be negative.

    Returns:
        Codes, shape (entries,), and the largest magnitude of each block of 256, shape (blocks,).

    Cost: one binary search an entry; 1.016 bytes an entry kept.
    """
    flat = x.detach().flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    book = code_book(signed).to(x.device)
    scaled = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: len(flat)], scale


def dequantise(
    codes: UInt8[Tensor, " entries"], scale: Float[Tensor, " blocks"], signed: bool
) -> Float[Tensor, " entries"]:
    """The values that :func:`quantise` kept, float32, shape (entries,)."""
    book = code_book(signed).to(codes.device)
    return book[codes.int()] * scale.repeat_interleave(BLOCK)[: len(codes)]

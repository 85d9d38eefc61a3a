"""How many losses one batched backward pass should take: measured once on the real model, remembered by the caller."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.autograd.jacobian import jacobian
from polytask.autograd.workspace import Workspace

# a batched pass must win by this much, or a pass a loss, which holds the cotangents of one, stays
MARGIN = 0.95
REPEATS = 2


def probe(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    own: Sequence[Sequence[Tensor]] | None = None,
    workspace: Workspace | None = None,
) -> int:
    """The fastest number of losses a pass for :func:`~polytask.autograd.jacobian.jacobian`: of 1, 2, 4, 8 and all.

    Args:
        losses: K scalars with graph, which is kept.
        parameters: the coordinates.
        own: for each loss, further tensors, as in ``jacobian``.
        workspace: memory for the rows, overwritten.

    Returns:
        A number from 1 to K. Cost: twice K backward passes for each candidate; memory as the largest of them needs.
    """
    K = len(losses)
    best, fastest = 1, float("inf")
    for together in sorted({n for n in (1, 2, 4, 8, K) if n <= K}):
        seconds = min(_seconds(losses, parameters, own, workspace, together) for _ in range(REPEATS))
        if seconds < fastest * (MARGIN if best == 1 else 1.0):
            best, fastest = together, seconds
    return best


def shape_key(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> str:
    """A name for a model's shape, the number of losses and the device, equal in every process and run."""
    shapes = repr([(tuple(p.shape), str(p.dtype)) for p in parameters])
    return f"{len(losses)} losses, {len(parameters)} parameters, {zlib.crc32(shapes.encode()):08x}, {parameters[0].device.type}"


def _seconds(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    own: Sequence[Sequence[Tensor]] | None,
    workspace: Workspace | None,
    together: int,
) -> float:
    _wait(parameters[0].device)
    started = time.perf_counter()
    jacobian(losses, parameters, own, retain_graph=True, workspace=workspace, together=together)
    _wait(parameters[0].device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)

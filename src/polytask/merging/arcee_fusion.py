"""Arcee Fusion: take over the most important entries of another model (Arcee AI, 2025, in mergekit)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError
from polytask.merging.base import CHUNK, Merger, Place
from polytask.merging.magnitudes import kth_largest_magnitude
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TINY = 1e-8


@register(
    "arcee_fusion",
    family="merging",
    paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    needs="experts",
    invariances=("copies",),
    exempt={
        "permutation": "it leads from the first model to the second",
        "scale": "importance goes by the softmax of the weights",
    },
)
class ArceeFusion(Merger):
    r"""Keep one model but for the entries that another changed most, in rows that it changed most.

    .. math:: I = |W_b - W_a| \odot \operatorname{KL}(\operatorname{softmax} W_b \,\Vert\, \operatorname{softmax} W_a), \qquad
        W = \begin{cases} W_b & I \ge I_{1/2} + \tfrac{3}{2} (I_{3/4} - I_{1/4}) \\ W_a & \text{else} \end{cases}

    with softmax and divergence along the last dimension, one number a row, and the tensor's quantiles :math:`I_q`. From the base to the
    expert where there is one expert, from the first expert to the second where there are two.

    Cost: a few passes over the two models, six of counting; one tensor beside them.
    """

    needs = "experts"
    most = 2
    scratch = 1.25

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        if len(W) == 1 and W0 is None:
            raise InputError("arcee_fusion needs two models: a base and an expert, or two experts")
        a, b = (W0, W[0]) if len(W) == 1 and W0 is not None else (W[0], W[1])
        if not a.numel():
            return a
        I = importance(a, b)  # noqa: E741
        n = I.numel()
        # the entry at place int(q (n - 1)) of the sorted ones
        low, middle, high = (kth_largest_magnitude(I, n - int(q * (n - 1))) for q in (0.25, 0.5, 0.75))
        return torch.where(middle + 1.5 * (high - low) <= I, b, a, out=a)


def importance(a: Float[Tensor, "... m"], b: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
    """How much each entry changed, times how much the softmax of its row did; a few rows at a time."""
    found = torch.empty_like(a)
    rows = max(1, CHUNK // a.shape[-1])
    flat = (w.view(-1, a.shape[-1]) for w in (a, b, found))
    for x, y, out in zip(*(torch.split(w, rows) for w in flat), strict=True):
        p, q = y.softmax(-1) + TINY, x.softmax(-1) + TINY
        # below zero only by rounding
        divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp_min(0)
        torch.mul((y - x).abs(), divergence, out=out)
    return found

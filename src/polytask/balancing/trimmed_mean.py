"""Coordinate-wise trimmed mean (Yin, Chen, Ramchandran and Bartlett, ICML 2018, arXiv:1803.01498)."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.errors import InputError
from polytask.registry import register

PIECE = 2**15  # coordinates looked at in one go


@register(
    "trimmed_mean",
    family="balancing",
    paper="arXiv:1803.01498",
    needs="jacobian",
    invariances=("permutation", "scale", "single"),
)
class TrimmedMean(GradientAggregator):
    r"""Average each coordinate over the tasks without its largest and smallest values, against outliers.

    .. math:: d_c = \frac{1}{K - 2t} \sum_{k = t + 1}^{K - t} g_{(k), c}

    with the values of coordinate c in ascending order. A preference multiplies the gradients before. With too few
    tasks present to leave any value, as many as possible are left out.

    Args:
        trim: t, how many values are left out at each end; 0 is the mean.

    Cost: 4 t + 1 operations on each of the K x P numbers a step.
    """

    def __init__(self, *, trim: int = 1, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if trim < 0:
            raise InputError(f"trimmed_mean leaves out at least 0 values, not {trim}")
        self.trim = trim

    def aggregate(
        self,
        J: Float[Tensor, "tasks coordinates"],
        losses: Float[Tensor, " tasks"] | None,  # noqa: ARG002
    ) -> Float[Tensor, " coordinates"]:
        k = len(J)
        t = min(self.trim, (k - 1) // 2)
        p = torch.as_tensor(self.p).to(J)[:, None]
        return torch.cat([_middle(list(piece * p), t) / (k - 2 * t) for piece in torch.split(J, PIECE, dim=1)]).to(J)


def _middle(rows: list[Float[Tensor, " piece"]], t: int) -> Float[Tensor, " piece"]:
    """The sum without the t smallest and the t largest of each coordinate: rows pass them one by one, and what falls through is added."""
    ends: list[Tensor] = []  # in ascending order
    for x in rows[: 2 * t]:
        for i, end in enumerate(ends):
            ends[i], x = torch.minimum(end, x), torch.maximum(end, x)
        ends.append(x)
    total = torch.zeros_like(rows[0], dtype=torch.promote_types(rows[0].dtype, torch.float32))
    for x in rows[2 * t :]:
        for i in range(t):
            ends[i], x = torch.minimum(ends[i], x), torch.maximum(ends[i], x)
        for i in reversed(range(t, 2 * t)):
            ends[i], x = torch.maximum(ends[i], x), torch.minimum(ends[i], x)
        total += x
    return total

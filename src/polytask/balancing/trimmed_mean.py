"""Coordinate-wise trimmed mean (Yin, Chen, Ramchandran and Bartlett, ICML 2018, arXiv:1803.01498)."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.errors import InputError
from polytask.registry import register


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

    Cost: one sort of K numbers a coordinate and step.
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
        ordered = torch.sort(J * torch.as_tensor(self.p).to(J)[:, None], dim=0).values
        return ordered[t : k - t].mean(0)

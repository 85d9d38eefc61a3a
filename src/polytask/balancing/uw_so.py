"""UW-SO: soft optimal uncertainty weighting (Kirchdorfer et al., 2024, arXiv:2408.07985)."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.errors import InputError
from polytask.registry import register


@register(
    "uw_so",
    family="balancing",
    paper="arXiv:2408.07985",
    needs="losses",
    aliases=("soft_optimal_uncertainty",),
    invariances=("permutation", "single"),
    exempt={"scale": "the temperature is measured in inverse loss units, and tuned for each problem"},
)
class UWSO(LossWeighting):
    r"""Give each loss the weight that uncertainty weighting would learn for it, softened by a temperature.

    .. math:: w = \mathrm{softmax}\left(\frac{1}{T L}\right)

    taken at the detached losses. The weights sum to 1; a preference multiplies them before.

    Args:
        temperature: T, to be tuned: the paper searches it for each data set; the larger, the more equal.

    Cost: a few operations on K numbers a step. Losses must be positive.
    """

    def __init__(self, *, temperature: float = 10.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not temperature > 0:
            raise InputError(f"the temperature of uw_so is positive, not {temperature}")
        self.temperature = temperature

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        positive = losses.detach().clamp_min(torch.finfo(losses.dtype).tiny)
        p = torch.as_tensor(self.p).to(losses)
        w = torch.softmax(1 / (self.temperature * positive) + p.log(), 0)
        return (w * losses).sum(), w

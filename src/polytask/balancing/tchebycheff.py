"""Tchebycheff scalarization (with its relatives; Bowman 1976; Steuer & Choo 1983; Wierzbicki 1980)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.ideal import ideal_point
from polytask.registry import register


@register(
    "tchebycheff",
    family="balancing",
    paper="doi:10.1007/978-3-642-87563-2_5",
    needs="losses",
    aliases=("TCH", "Tche", "chebyshev"),
    invariances=("permutation", "scale", "single"),
)
class Tchebycheff(LossWeighting):
    r"""Minimise the largest weighted distance to the ideal losses.

    .. math:: L = \max_i\; v_i (L_i - z_i) + \rho \sum_i v_i (L_i - z_i)

    with :math:`v = p`, or :math:`v = 1/p` in the modified form, whose solution lies where losses are in proportion to
    p. With :math:`\rho > 0` it is the augmented form, whose solutions are properly Pareto optimal. Ties share the
    gradient.

    Args:
        rho: weight of the sum; 0 is the plain maximum, 0.1 the usual augmentation.
        modified: divide by p instead of multiplying.
        ideal: z, the lowest losses thought possible: one number or one a task; 0 by default.

    Cost: a few operations on K numbers. See ``stch`` for the smooth form, which learns from all tasks at every step.
    """

    def __init__(
        self,
        *,
        rho: float = 0.0,
        modified: bool = False,
        ideal: float | Sequence[float] = 0.0,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        self.rho, self.modified, self.ideal = rho, modified, ideal

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        v = torch.as_tensor(1 / self.p if self.modified else self.p).to(losses)
        f = v * (losses - ideal_point(self, self.ideal, losses))
        largest = f.detach() == f.detach().max()
        w = v * (largest / largest.sum() + self.rho)
        return (f * largest).sum() / largest.sum() + self.rho * f.sum(), w

"""Weighted p-norm of the losses (global criterion method; Zeleny 1973)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.ideal import ideal_point
from polytask.errors import InputError
from polytask.registry import register


@register(
    "p_norm",
    family="balancing",
    paper="Zeleny, Compromise Programming, 1973",
    needs="losses",
    aliases=("pnorm", "Lp"),
    invariances=("permutation", "scale", "single"),
)
class PNorm(LossWeighting):
    r"""Minimise the p-norm of the weighted distances to the ideal losses.

    .. math:: L = \Bigl(\sum_i (p_i (L_i - z_i))^q\Bigr)^{1/q}

    q = 1 is the weighted sum, :math:`q \to \infty` Tchebycheff.

    Args:
        q: exponent, at least 1.
        ideal: z, the lowest losses thought possible: one number or one a task; 0 by default. Losses below it count as
            equal to it.

    Cost: a few operations on K numbers.
    """

    def __init__(self, *, q: float = 2.0, ideal: float | Sequence[float] = 0.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not q >= 1:
            raise InputError(f"the exponent q of p_norm is at least 1, not {q}")
        self.q, self.ideal = q, ideal

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        p = torch.as_tensor(self.p).to(losses)
        f = (p * (losses.detach() - ideal_point(self, self.ideal, losses))).clamp_min(0)
        largest = f.max().clamp_min(torch.finfo(losses.dtype).tiny)
        share = f / largest
        # at least 1 unless all losses are ideal, where nothing is to be gained
        spread = (share**self.q).sum().clamp_min(1.0) ** (1 / self.q)
        norm = largest * spread
        w = p * (share / spread) ** (self.q - 1)
        return (w * (losses - losses.detach())).sum() + norm, w

"""COSMOS' scalarization (Ruchte and Grabocka, ICDM 2021, arXiv:2103.12868)."""

from __future__ import annotations

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.registry import register


@register(
    "cosmos",
    family="balancing",
    paper="arXiv:2103.12868",
    needs="losses",
    invariances=("permutation", "single"),
    exempt={"scale": "the cosine has no scale while the sum has: their trade-off moves with the losses' size"},
)
class COSMOS(LossWeighting):
    r"""Minimise the weighted sum, and the angle between the losses and the preference.

    .. math:: L = \sum_i p_i L_i - \lambda \frac{\langle p, L\rangle}{\lVert p\rVert \lVert L\rVert}

    The paper trains one network for all preferences, drawn anew at each step; this is its loss for one.

    Args:
        lam: :math:`\lambda`, weight of the angle; the paper uses 0.01 to 8.

    Cost: a few operations on K numbers.
    """

    def __init__(self, *, lam: float = 1.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.lam = lam

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        p = torch.as_tensor(self.p).to(losses)
        f = losses.detach()
        length = f.norm().clamp_min(torch.finfo(losses.dtype).tiny)
        cosine = (p @ (f / length)) / p.norm()
        w = p - self.lam * (p / p.norm() - cosine * (f / length)) / length
        # one loss has no angle, rounding aside, nor have losses of 0: the derivative of the cosine is none
        w = p if len(losses) == 1 else torch.where(f.any(), w, p)
        return (w * (losses - f)).sum() + p @ f - self.lam * cosine, w

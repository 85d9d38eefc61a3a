"""LDC-MTL: loss discrepancy control (Xiao, Dong, Zou and Ji, 2025, arXiv:2502.08585)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.inner_adam import InnerAdam
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.registry import register


@register(
    "ldc_mtl",
    family="balancing",
    paper="arXiv:2502.08585",
    needs="losses",
    aliases=("BiLB4MTL", "loss_discrepancy_control"),
    invariances=("scale",),
    exempt={"permutation": "the paper compares each loss with the next one, in the order given"},
)
class LDCMTL(LossWeighting):
    r"""Minimise a weighted sum of the losses and the gaps between them, over the model and over the weights.

    .. math:: \min_{x, W}\; \sum_i \sigma_i\, l_i + \lambda \sum_{i < K} |\tau_i l_i - \tau_{i+1} l_{i+1}|, \qquad
        l_i = p_i L_i / L_i(0), \quad \sigma = \mathrm{softmax}(W)

    the single-loop form of a bilevel problem: the gaps are to be closed by weights whose sum of losses the model minimises.
    :math:`\tau = \sigma`, or 1. W holds one number a task here, learnt by its own Adam (the authors' router also sees the
    features); losses are measured by the first ones seen.

    Args:
        lam: :math:`\lambda`, price of the gaps; 0.05 to 0.1 in the authors' code.
        scaled: :math:`\tau = \sigma` rather than 1.
        lr: step size of W.

    Cost: a few operations on K numbers a step, one backward pass. Losses must be positive.
    """

    def __init__(self, *, lam: float = 0.1, scaled: bool = True, lr: float = 1e-3, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not lam >= 0:
            raise InputError(f"the price lam of ldc_mtl is at least 0, not {lam}")
        self.lam, self.scaled, self.lr = lam, scaled, lr
        self.adam = InnerAdam("router", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**self.adam.start(n_tasks, 0.0), "first_loss": torch.full((n_tasks,), torch.nan, dtype=torch.float64)}

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["first_loss"]), losses.device)
        first = self.state["first_loss"] = self.state["first_loss"].to(losses.device)
        seen = losses.detach().double()
        first[rows] = torch.where(torch.isnan(first[rows]), seen, first[rows])
        start, p = first[rows].abs(), torch.as_tensor(self.p).to(seen)  # logarithms begin below 0 too
        start = torch.where(start > 0, start, 1.0)
        values = p * (seen / start)
        sigma = torch.softmax(self.adam.read(self.state, rows, losses.device).double(), 0)
        tau = sigma if self.scaled else torch.ones_like(sigma)
        # d gap / d (tau l): +1 from the pair with the next loss, -1 from the pair with the one before
        signs = torch.sign(torch.diff(tau * values))
        slope = self.lam * (torch.nn.functional.pad(-signs, (0, 1)) + torch.nn.functional.pad(signs, (1, 0)))
        by_sigma = values * (1 + slope) if self.scaled else values
        self.adam.step(self.state, rows, sigma * (by_sigma - sigma @ by_sigma))
        w = (p * (sigma + slope * tau) / start).to(losses)
        total = (sigma @ values + self.lam * torch.diff(tau * values).abs().sum()).to(losses)
        # the value is the total, its derivative w
        return (w * (losses - losses.detach())).sum() + total, w

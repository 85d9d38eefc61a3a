"""Uncertainty weighting (Kendall, Gal and Cipolla, CVPR 2018, arXiv:1705.07115)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.inner_adam import InnerAdam
from polytask.balancing.rows import rows_of
from polytask.registry import register


@register(
    "uncertainty",
    family="balancing",
    paper="arXiv:1705.07115",
    needs="losses",
    aliases=("UW", "UWL", "uncertainty_weighting"),
    invariances=("permutation",),
    exempt={"scale": "the log-variances follow the scale of the losses only as fast as they are learnt"},
)
class Uncertainty(LossWeighting):
    r"""Divide each loss by a learnt variance.

    .. math:: L = \sum_i p_i \left( \tfrac12 e^{-s_i} L_i + \tfrac12 s_i \right), \qquad s_i = \log \sigma_i^2

    The log-variances s descend the same objective by an Adam of their own; at its optimum :math:`s_i = \log L_i` the
    weights are :math:`1 / (2 L_i)`.

    Args:
        lr: step size of the log-variances, the published benchmark's 0.025.
        start: first value of every :math:`s_i`.

    Cost: a dozen operations on K numbers a step. The losses should be positive: a loss that can stay negative drives
    its variance to 0.
    """

    def __init__(self, *, lr: float = 0.025, start: float = -0.5, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.lr, self.start = lr, start
        self.adam = InnerAdam("log_variance", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return self.adam.start(n_tasks, self.start)

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["log_variance"]), losses.device)
        p = torch.as_tensor(self.p, dtype=torch.float32, device=losses.device)
        s = self.adam.read(self.state, rows, losses.device)
        w = 0.5 * p * torch.exp(-s)
        self.adam.step(self.state, rows, 0.5 * p - w * losses.detach())
        return (w * losses + 0.5 * p * s).sum(), w.to(losses.dtype)

"""IMTL-L: impartial multi-task learning, loss part (Liu et al., ICLR 2021)."""

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
    "imtl_l",
    family="balancing",
    paper="openreview:IMPnRXEWpvr",
    needs="losses",
    aliases=("IMTLL",),
    invariances=("permutation",),
    exempt={"scale": "the scales follow those of the losses only as fast as they are learnt"},
)
class IMTLL(LossWeighting):
    r"""Learn a scale for each loss that brings all scaled losses to 1.

    .. math:: L = \sum_i p_i \left( e^{s_i} L_i - s_i \right)

    The scales s descend the same objective by an Adam of their own, towards :math:`e^{s_i} L_i = 1`.

    Args:
        lr: step size of s.

    Cost: a dozen operations on K numbers a step. The losses should be positive.
    """

    def __init__(self, *, lr: float = 0.025, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.lr = lr
        self.adam = InnerAdam("log_scale", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return self.adam.start(n_tasks, 0.0)

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["log_scale"]), losses.device)
        p = torch.as_tensor(self.p, dtype=torch.float32, device=losses.device)
        s = self.adam.read(self.state, rows, losses.device)
        w = p * torch.exp(s)
        self.adam.step(self.state, rows, w * losses.detach() - p)
        return (w * losses - p * s).sum(), w.to(losses.dtype)

"""Dynamic weight average (Liu, Johns and Davison, CVPR 2019, arXiv:1803.10704)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.epoch_mean import EpochMean
from polytask.registry import register


@register(
    "dwa",
    family="balancing",
    paper="arXiv:1803.10704",
    needs="losses",
    aliases=("dynamic_weight_average",),
    invariances=("permutation", "scale", "single"),
)
class DWA(LossWeighting):
    r"""Give more weight to the tasks whose losses fall slowest from epoch to epoch.

    .. math:: w = K\, \mathrm{softmax}(r / T), \qquad r_i = \bar L_i(e-1) / \bar L_i(e-2)

    with the mean loss of each of the last two epochs; equal weights until both are known. Needs ``begin_epoch()`` at
    the start of every
    epoch, as the built-in loop does; without it the weights stay equal. A preference multiplies the weights.

    Args:
        temperature: T; the higher, the more equal.

    Cost: one addition of K numbers a step.
    """

    def __init__(self, *, temperature: float = 2.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.temperature = temperature
        self.running = EpochMean("epoch")

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        nan = torch.full((n_tasks,), torch.nan)
        return {**self.running.start(n_tasks), "last": nan.clone(), "before_last": nan.clone()}

    def begin_epoch(self) -> None:
        if self.state and self.running.started(self.state):
            mean = self.running.finish(self.state)
            # a task absent for a whole epoch keeps the two means it has
            seen = ~torch.isnan(mean)
            last = self.state["last"].to(mean.device)
            self.state["before_last"] = torch.where(seen, last, self.state["before_last"].to(mean.device))
            self.state["last"] = torch.where(seen, mean, last)

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        active = torch.as_tensor(self.active, device=losses.device)
        self.running.add(self.state, active, losses.detach())
        r = (self.state["last"] / self.state["before_last"]).to(losses.device)[active]
        r = torch.where(torch.isfinite(r), r, torch.ones_like(r))
        p = torch.as_tensor(self.p, dtype=torch.float32, device=losses.device)
        w = (p * len(losses) * torch.softmax(r / self.temperature, 0)).to(losses.dtype)
        return (w * losses).sum(), w

"""Dynamic weight average (Liu, Johns and Davison, CVPR 2019, arXiv:1803.10704)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.epoch_mean import EpochMean
from polytask.balancing.rows import rows_of
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
    the start of every epoch, as the built-in loop does; without it the weights stay equal. A preference multiplies the
    weights.

    Args:
        temperature: T; the higher, the more equal.

    Cost: one addition of K numbers a step.
    """

    def __init__(self, *, temperature: float = 2.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.temperature = temperature
        self.running = EpochMean()

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        nan = torch.full((n_tasks,), torch.nan, dtype=torch.float32)
        return {**self.running.start(n_tasks), "last": nan.clone(), "before_last": nan.clone()}

    def begin_epoch(self) -> None:
        mean = self.running.end(self.state)
        if mean is not None:
            # a task absent for a whole epoch keeps the two means it has
            seen, last, before = ~torch.isnan(mean), *(self.state[k].to(mean.device) for k in ("last", "before_last"))
            self.state["before_last"] = torch.where(seen, last, before)
            self.state["last"] = torch.where(seen, mean, last)

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["last"]), losses.device)
        self.running.add(self.state, rows, losses)
        r = (self.state["last"] / self.state["before_last"]).to(losses.device)[rows].nan_to_num(1.0, 1.0)
        p = torch.as_tensor(self.p, dtype=torch.float32, device=losses.device)
        w = (p * len(losses) * torch.softmax(r / self.temperature, 0)).to(losses.dtype)
        return (w * losses).sum(), w

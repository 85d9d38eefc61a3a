"""IGB: improvable gap balancing, first version (Dai, Fei and Lu, UAI 2023, arXiv:2307.15429)."""

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
    "igb",
    family="balancing",
    paper="arXiv:2307.15429",
    needs="losses",
    aliases=("IGBv1", "improvable_gap_balancing"),
    invariances=("permutation", "scale"),
)
class IGB(LossWeighting):
    r"""Give more weight to the tasks that have improved least since early training, on logarithms of the losses.

    .. math:: L = \sum_i w_i \log L_i, \qquad w = K\, \mathrm{softmax}(L / \bar L)

    with :math:`\bar L` the mean losses of the epoch of index ``base_epoch``; equal weights up to its end. Needs
    ``begin_epoch()`` at the start of every epoch, as the built-in loop does. A preference multiplies the weights. (The
    second version learns the weights by reinforcement.)

    Args:
        base_epoch: the epoch that the losses are measured by.

    Cost: a few operations on K numbers a step. Losses must be positive.
    """

    takes_logarithms = True

    def __init__(self, *, base_epoch: int = 1, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.base_epoch = base_epoch
        self.running = EpochMean()

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**self.running.start(n_tasks), "base": torch.full((n_tasks,), torch.nan, dtype=torch.float32)}

    def begin_epoch(self) -> None:
        mean = self.running.end(self.state)
        if mean is not None and self.state["epoch"] - 1 == self.base_epoch:
            self.state["base"] = mean

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["base"]), losses.device)
        self.running.add(self.state, rows, losses)
        positive = losses.clamp_min(torch.finfo(losses.dtype).tiny)
        gap = positive.detach() / self.state["base"].to(losses)[rows]
        # before the base epoch has ended, or for a task it lacked, no gap is known: an average one is assumed
        gap = gap.nan_to_num(1.0)
        w = torch.as_tensor(self.p).to(losses) * len(losses) * torch.softmax(gap, 0)
        return (w * positive.log()).sum(), w / positive.detach()

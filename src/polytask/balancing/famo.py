"""FAMO: fast adaptive multitask optimization (Liu, Feng, Stone and Liu, NeurIPS 2023, arXiv:2306.03792)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.inner_adam import InnerAdam
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.registry import register


@register(
    "famo",
    family="balancing",
    paper="arXiv:2306.03792",
    needs="second evaluation",
    invariances=("permutation", "scale", "single"),
)
class FAMO(LossWeighting):
    r"""Lower all log-losses at the same rate, learning the weights from how much each fell.

    .. math:: L = \frac1c \sum_i z_i \log D_i, \quad z = \mathrm{softmax}(\xi), \quad D_i = L_i - L_i^{\min}, \quad
        c = \sum_i z_i / D_i

    so that the weights of the losses sum to 1. After the step the losses of the same batch are looked at again:
    :math:`\delta_i = \log D_i^{\text{before}} - \log D_i^{\text{after}}`, and :math:`\xi` takes an Adam step against
    :math:`J_z^\top \delta`. Give the second losses to ``after_step``; when it is not called, the next step's losses
    (of another batch: free, but noisier) stand in for them. A preference multiplies z.

    Args:
        lr: step size of :math:`\xi`.
        decay: weight decay of :math:`\xi`; the paper uses 0.001 to 0.02.
        lowest: :math:`L^{\min}`, lower bounds of the losses: one number or one a task, in the order bound.
        second_look: whether the training loop is to look at the losses of the same batch again. Without, steps cost what those
            of any loss weighting cost, and the next step's losses stand in.

    Cost: one more forward pass a step, or none.
    """

    takes_logarithms = True

    def __init__(
        self,
        *,
        lr: float = 0.025,
        decay: float = 1e-3,
        lowest: float | Sequence[float] = 0.0,
        second_look: bool = True,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        self.second_look = self.needs_second_evaluation = second_look
        self.lr, self.decay, self.lowest = lr, decay, lowest
        self.adam = InnerAdam("xi", lr, decay)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        if isinstance(self.lowest, Sequence) and len(self.lowest) != n_tasks:
            raise InputError(f"famo has {len(self.lowest)} lowest losses for {n_tasks} tasks")
        # before: log D of the last step, waiting for its second look; NaN where there is none
        return {
            **self.adam.start(n_tasks, 0.0),
            "before": torch.full((n_tasks,), torch.nan, dtype=torch.float32),
            "waiting": np.zeros(n_tasks, dtype=bool),
        }

    def _log_distance(self, losses: Tensor, active: npt.NDArray[np.intp]) -> Tensor:
        lowest = (
            losses.new_tensor([self.lowest[i] for i in active]) if isinstance(self.lowest, Sequence) else self.lowest
        )
        return (losses - lowest).clamp_min(torch.finfo(losses.dtype).tiny).log()

    def _learn(self, active: npt.NDArray[np.intp], after: Float[Tensor, " active"]) -> None:
        waiting = self.state["waiting"]
        both = waiting[active]
        if both.any():
            rows = rows_of(active[both], len(waiting), after.device)
            now = after if both.all() else after[torch.as_tensor(both, device=after.device)]
            delta = self.state["before"].to(after.device)[rows] - now.float()
            z = torch.softmax(self.adam.read(self.state, rows, after.device), 0)
            self.adam.step(self.state, rows, z * (delta - z @ delta))
        waiting[:] = False

    def look_again(self, losses: Mapping[str, Tensor]) -> None:
        assert self.tasks is not None
        values = torch.stack([loss.detach().reshape(()) for loss in losses.values()])
        active = np.array([self.tasks.index(n) for n in losses], dtype=np.intp)
        self._learn(active, self._log_distance(values, active))

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        log_d = self._log_distance(losses, self.active)
        now = log_d.detach()
        self._learn(self.active, now)
        rows = rows_of(self.active, len(self.state["waiting"]), losses.device)
        before = self.state["before"] = self.state["before"].to(losses.device)
        before[rows] = now.float()
        self.state["waiting"][self.active] = True
        log_z = self.adam.read(self.state, rows, losses.device).to(losses.dtype)
        if self.preference is not None:
            log_z = log_z + torch.as_tensor(self.p).to(losses).log()
        z = torch.softmax(log_z, 0)
        # z / D scaled to sum to 1, through logarithms so that no loss is too small; 1 / c = sum_i w_i D_i
        w = torch.softmax(log_z - now, 0)
        return (z * log_d).sum() * (w @ now.exp()), w

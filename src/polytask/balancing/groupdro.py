"""GroupDRO: group distributionally robust optimization (Sagawa et al., ICLR 2020, arXiv:1911.08731)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.rows import rows_of
from polytask.registry import register


@register(
    "groupdro",
    family="balancing",
    paper="arXiv:1911.08731",
    needs="losses",
    aliases=("group_dro", "DRO"),
    invariances=("permutation", "single"),
    exempt={"scale": "how fast the weights move depends on the size of the losses, as in the paper"},
)
class GroupDRO(LossWeighting):
    r"""Shift weight to the tasks with the largest losses, towards the worst mixture of tasks.

    .. math:: w_i \propto p_i\, w_i\, e^{\eta L_i}, \qquad \sum_i w_i = K

    (exponentiated gradient ascent; p enters once, at the start). The weights are kept as logarithms, which nothing
    overflows.

    Args:
        eta: :math:`\eta`, step size of the weights.

    Cost: a few operations on K numbers a step.
    """

    def __init__(self, *, eta: float = 0.01, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.eta = eta

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"log_weights": torch.zeros(n_tasks, dtype=torch.float32)}

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["log_weights"]), losses.device)
        log_w = self.state["log_weights"] = self.state["log_weights"].to(losses.device)
        log_w[rows] += self.eta * losses.detach().float()
        p = torch.as_tensor(self.p, dtype=torch.float32, device=losses.device)
        w = (len(losses) * torch.softmax(log_w[rows] + p.log(), 0)).to(losses.dtype)
        return (w * losses).sum(), w

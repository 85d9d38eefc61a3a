"""GO4Align: group optimization for multi-task alignment (Shen et al., NeurIPS 2024, arXiv:2404.06486)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting, Vector
from polytask.errors import InputError
from polytask.registry import register

# a loss counts as at least so much of the largest: its weight stays a number of single precision
LEAST = 1e-12


@register(
    "go4align",
    family="balancing",
    paper="arXiv:2404.06486",
    needs="losses",
    aliases=("group_alignment",),
    invariances=("permutation", "single"),
    exempt={"scale": "how fast the history moves depends on the size of the losses, as in the paper"},
)
class GO4Align(LossWeighting):
    r"""Scale the losses to one size, lean towards the tasks whose losses were small, and let groups of like tasks share a weight.

    .. math:: q_i \propto q_i\, e^{-\eta L_i}, \qquad u_i = q_i \sum_j L_j / L_i, \qquad
        w_i = p_i\, \mathrm{mean}\{u_j : j \text{ in the group of } i\}

    with groups by k-means on u, solved exactly (on a line, groups are intervals) where the authors start from random centres.

    Args:
        groups: how many groups; all tasks their own where fewer are present.
        eta: :math:`\eta`, step size of the history q.

    Cost: one transfer of K numbers to the host, and :math:`K^2` operations there, a step. Losses must be positive.
    """

    def __init__(self, *, groups: int = 2, eta: float = 1e-4, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if groups < 1:
            raise InputError(f"go4align makes at least one group, not {groups}")
        self.groups, self.eta = groups, eta

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"log_history": np.zeros(n_tasks)}

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        values = losses.detach().double().cpu().numpy()
        values = np.maximum(values, max(LEAST * values.max(), np.finfo(np.float64).tiny))
        history = self.state["log_history"]
        history[self.active] -= self.eta * values
        q = np.exp(history[self.active] - history[self.active].max())
        u = q / q.sum() * values.sum() / values
        w = torch.as_tensor(self.p * _group_means(u, self.groups)).to(losses)
        return (w * losses).sum(), w


def _group_means(u: Vector, groups: int) -> Vector:
    """Each number replaced by the mean of its group in the best partition into intervals, by dynamic programming."""
    order = np.argsort(u, kind="stable")
    v, k = u[order], len(u)
    sums, squares = np.r_[0.0, np.cumsum(v)], np.r_[0.0, np.cumsum(v * v)]
    first, last = np.meshgrid(np.arange(k + 1), np.arange(k + 1), indexing="ij")
    count = np.maximum(last - first, 1)
    # spread[i, j]: squared deviations within v[i:j]
    spread = squares[last] - squares[first] - (sums[last] - sums[first]) ** 2 / count
    spread[first >= last] = np.inf
    cost, cuts = spread[0], []
    for _ in range(min(groups, k) - 1):
        total = cost[:, None] + spread
        cuts.append(total.argmin(0))
        cost = total.min(0)
    mean, end = np.empty(k), k
    for cut in [*reversed(cuts), None]:
        start = 0 if cut is None else int(cut[end])
        mean[order[start:end]] = (sums[end] - sums[start]) / (end - start)
        end = start
    return mean

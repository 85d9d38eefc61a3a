"""CR-MOGM: correlation-reduced multi-objective gradient manipulation (Zhou et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import min_norm_point
from polytask.registry import register


@register(
    "cr_mogm",
    family="balancing",
    paper="NeurIPS 2022, On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond",
    needs="gramian",
    invariances=("permutation", "scale", "single"),
)
class CRMOGM(GramianWeighting):
    r"""Smooth MGDA's weights over steps, so that they depend less on the batch whose gradients they weigh.

    .. math:: w_t = \alpha\, w_{t-1} + (1 - \alpha) \arg\min_{w \in \Delta} w^\top C_t w, \qquad
        d = \sum_i p_i w_{t,i}\, g_i

    starting from equal weights that sum to 1. Tasks absent from a batch keep theirs, and those present share their own
    sum.

    Args:
        alpha: :math:`\alpha`, share of the previous weights.

    Cost: one active-set solve of K unknowns a step.
    """

    def __init__(self, *, alpha: float = 0.9, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not 0 <= alpha < 1:
            raise InputError(f"the smoothing alpha of cr_mogm lies in [0, 1), not {alpha}")
        self.alpha = alpha

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"weights": np.full(n_tasks, 1 / n_tasks)}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        before = self.state["weights"][self.active]
        share, p = before.sum(), self.p
        w = self.alpha * before + (1 - self.alpha) * share * min_norm_point(C * p * p[:, None], self.precision)
        self.state["weights"][self.active] = w
        return np.asarray(p * w / share)

"""PCD: priority-constrained descent (TMLR 2026, arXiv:2606.29521)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.main_task import check_main, main_position
from polytask.errors import InputError
from polytask.linalg import definite, nonnegative_qp
from polytask.registry import register

logger = logging.getLogger(__name__)

FEASIBLE = 1e-6


@register(
    "pcd",
    family="balancing",
    paper="arXiv:2606.29521",
    needs="gramian",
    aliases=("priority_constrained_descent",),
    invariances=("scale", "single"),
    exempt={
        "permutation": "the main task is named by its position",
        "duplicate": "one copy is the main task and the other a secondary one",
        "preference": "the order of priority stands in the place of a preference, which is refused",
        "preference_length": "the order of priority stands in the place of a preference, which is refused",
    },
)
class PCD(GramianWeighting):
    r"""Follow the main task's gradient as closely as a small guaranteed progress of every other task allows.

    .. math:: \tilde d = \arg\min_d \lVert d - \tilde g_0\rVert^2 \quad \text{s.t.} \quad
        \langle \tilde g_j, d\rangle \ge \tau \lVert\tilde g_j\rVert^2, \; j \ne 0, \qquad
        d = \lVert g_0\rVert\, \tilde d / \lVert\tilde d\rVert

    with gradients :math:`\tilde g_i = g_i / \sqrt{\hat v_i}` measured by the (bias-corrected) moving averages
    :math:`\hat v` of their squared lengths, and 0 the main task. Where the constraints exclude one another they are
    dropped, and the log says so; where the main task is absent the others are added.

    Args:
        main: the main task, by name or position.
        tau: share of its own step's progress that each other task is guaranteed.
        beta: memory of the averages.

    Cost: one active-set solve of K - 1 unknowns a step.
    """

    def __init__(
        self, *, main: str | int = 0, tau: float = 0.02, beta: float = 0.999, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if self.preference is not None:
            raise InputError("pcd ranks the tasks by main= and takes no preference")
        if not (0 <= tau <= 1 and 0 <= beta < 1):
            raise InputError(f"pcd takes tau in [0, 1] and beta in [0, 1), not {tau} and {beta}")
        self.main, self.tau, self.beta = main, tau, beta

    def bind(self, tasks: Sequence[str]) -> None:
        check_main(self, self.main, tasks)
        super().bind(tasks)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"squares": np.zeros(n_tasks), "steps": np.zeros(n_tasks)}

    def _normalizers(self, C: Matrix) -> Vector:
        squares, steps = self.state["squares"], self.state["steps"]
        steps[self.active] += 1
        old = squares[self.active]
        squares[self.active] = self.beta * old + (1 - self.beta) * self.mean_square * np.diag(C)
        corrected = squares[self.active] / (1 - self.beta ** steps[self.active]) / self.mean_square
        return np.asarray(1 / np.sqrt(corrected))

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        s = self._normalizers(C)
        position = main_position(self, self.main)
        if position not in self.active:
            return np.ones(len(C))
        first = int(np.flatnonzero(self.active == position)[0])
        others = np.arange(len(C)) != first
        w: Vector = np.eye(len(C))[first]
        if not others.any():
            return w
        G = C * s * s[:, None]
        n = np.sqrt(np.diag(G))[others]
        R = G[np.ix_(others, others)] / n / n[:, None]
        wanted = self.tau * n - G[others, first] / n  # what the main gradient leaves undone
        y = nonnegative_qp(definite(R, self.precision), -wanted[None])[0]
        if (R @ y - wanted).min() < -max(FEASIBLE, 10 * self.precision) * max(1.0, float(np.abs(wanted).max())):
            logger.info("no direction gives every secondary task its share: the main task's gradient is used")
            return w
        v = w.copy()
        v[others] = y / n
        squared = float(v @ G @ v)
        return np.asarray(v * s * np.sqrt(C[first, first] / squared)) if squared > FEASIBLE**2 else np.zeros(len(C))

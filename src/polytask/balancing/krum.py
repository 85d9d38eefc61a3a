"""Multi-Krum (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.registry import register

TIE = 1e-9


@register(
    "krum",
    family="balancing",
    paper="NeurIPS 2017, Machine Learning with Adversaries",
    needs="gramian",
    aliases=("multi_krum",),
    invariances=("permutation", "scale", "single"),
)
class Krum(GramianWeighting):
    r"""Average only the gradients that lie closest to the others, against outliers.

    .. math:: s_i = \text{sum of the } K - f - 2 \text{ smallest } \lVert g_i - g_j\rVert^2, \quad j \ne i, \qquad
        d = \frac1m \sum_{i \text{ among the } m \text{ least } s} g_i

    Squares as in the paper; TorchJD adds the distances themselves. Gradients whose scores tie with the last one chosen are averaged
    too, so that no order of the tasks matters. A preference scales the gradients before.

    Args:
        outliers: f, how many tasks may be outliers; at least one neighbour is always counted.
        selected: m, how many gradients are averaged; all where fewer are present.

    Cost: K x K distances a step.
    """

    def __init__(self, *, outliers: int = 1, selected: int = 1, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if outliers < 0 or selected < 1:
            raise InputError(f"krum takes outliers >= 0 and selected >= 1, not {outliers} and {selected}")
        self.outliers, self.selected = outliers, selected

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        p, k = self.p, len(C)
        C = C * p * p[:, None]
        squares = np.diag(C)
        distances = np.maximum(squares + squares[:, None] - 2 * C, 0.0)
        np.fill_diagonal(distances, np.inf)
        neighbours = min(max(k - self.outliers - 2, 1), k - 1)
        scores = np.sort(distances, axis=1)[:, :neighbours].sum(1)
        last = np.sort(scores)[min(self.selected, k) - 1]
        chosen = scores <= last * (1 + TIE)
        return np.asarray(p * chosen / chosen.sum())

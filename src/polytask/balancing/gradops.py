"""GradOPS: gradient deconfliction via orthogonal projections onto subspaces (Zhu et al., WSDM 2025, arXiv:2503.03438)."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.linalg import correlation, definite, ridge
from polytask.registry import register

# the least progress that counts, in units of the mean: a power of less would let one task alone decide
LEAST = 1e-3


@register(
    "gradops",
    family="balancing",
    paper="arXiv:2503.03438",
    needs="gramian",
    aliases=("orthogonal_projections_onto_subspaces",),
    invariances=("permutation", "scale", "non_conflict", "single"),
)
class GradOPS(GramianWeighting):
    r"""Take out of each gradient that opposes another one all that the others span, and add what is left.

    .. math:: g_i' = g_i - \mathrm{proj}_{S_i}\, g_i, \quad S_i = \mathrm{span}\{g_j\}_{j \ne i}, \quad
        \text{where some } \langle g_i, g_j\rangle < 0, \qquad d = \sum_i w_i p_i\, g_i'

    No :math:`g_i'` opposes any gradient, so neither does any sum of them with positive weights: unlike PCGrad's, for any number of
    tasks and in no order. A gradient that lies in the span of the others leaves nothing. Which of the possible trade-offs is made,
    the paper lets powers of each task's progress decide:

    .. math:: w_i = \frac{R_i^\alpha}{\frac1K \sum_j R_j^\alpha}, \qquad
        R_i = \frac{\langle g_i, \sum_j p_j g_j'\rangle}{\lVert g_i\rVert^2}

    The form of :math:`R_i` is inferred from its description as relative progress [inferred]; that powers of it weigh the
    :math:`g_i'` is not.

    Args:
        alpha: :math:`\alpha`; 0 weighs all alike, more favours the tasks that get on best, less than 0 those that get on worst.

    Cost: one K x K inversion a step.
    """

    def __init__(self, *, alpha: float = 0.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.alpha = alpha

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        R, n = correlation(C)
        least = ridge(len(C), self.precision)
        X = np.linalg.inv(definite(R, self.precision))
        # row i of X over X_ii: unit gradient i without its projection, whose squared length is 1 / X_ii
        A = X / np.diag(X)[:, None]
        A[np.diag(X) * 10 * least >= 1] = 0.0
        opposed = R.min(1) < -least
        A[~opposed] = np.eye(len(C))[~opposed]
        v = (self.p * n) @ A / n
        if self.alpha == 0:
            return np.asarray(v)
        progress = C @ v / np.diag(C)
        progress = np.maximum(progress, LEAST * np.abs(progress).mean())
        if not progress.any():
            return np.asarray(v)
        w = (progress / progress.max()) ** self.alpha
        return np.asarray((w / w.mean() * self.p * n) @ A / n)

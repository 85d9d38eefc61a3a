"""GradOPS: gradient deconfliction via orthogonal projections onto subspaces (Zhu et al., WSDM 2025, arXiv:2503.03438)."""

from __future__ import annotations

import numpy as np

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import correlation, definite, ridge
from polytask.registry import register


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
        \text{where some } \langle g_i, g_j\rangle < 0, \qquad d = \sum_i p_i\, g_i'

    No :math:`g_i'` opposes any gradient, so neither does any sum of them with positive weights: unlike PCGrad's, for any number of
    tasks and in no order. A gradient that lies in the span of the others leaves nothing. The paper further re-weighs the
    :math:`g_i'` by powers of each task's progress; a preference takes that place here.

    Cost: one K x K inversion a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        R, n = correlation(C)
        least = ridge(len(C), self.precision)
        X = np.linalg.inv(definite(R, self.precision))
        # row i of X over X_ii: unit gradient i without its projection, whose squared length is 1 / X_ii
        A = X / np.diag(X)[:, None]
        A[np.diag(X) * 10 * least >= 1] = 0.0
        opposed = R.min(1) < -least
        A[~opposed] = np.eye(len(C))[~opposed]
        return np.asarray((self.p * n) @ A / n)

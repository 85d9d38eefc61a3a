"""ConFIG: conflict-free inverse gradients (Liu, Chu and Thuerey, ICLR 2025, arXiv:2408.11104)."""

from __future__ import annotations

import numpy as np

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import correlation
from polytask.registry import register

RANK_TOLERANCE = 1e-10


@register(
    "config",
    family="balancing",
    paper="arXiv:2408.11104",
    needs="gramian",
    aliases=("conflict_free_inverse_gradient",),
    invariances=("permutation", "scale", "single"),
)
class ConFIG(GramianWeighting):
    r"""Take the direction at the same angle to every task gradient, as long as their projections together.

    .. math:: x = U^{+} p, \qquad u = x / \lVert x\rVert, \qquad d = \Bigl(\sum_i \langle g_i, u\rangle\Bigr) u

    with the unit gradients as rows of U. On the Gramian: :math:`v = R^{+} p` with the cosines R,
    :math:`x = \sum_i v_i g_i / \lVert g_i\rVert`. With a preference the cosines are in proportion to it. Free of
    conflict where the gradients are linearly independent and the projections' sum is positive.

    Cost: one K x K eigendecomposition a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        R, n = correlation(C)
        values, V = np.linalg.eigh(R)
        kept = values > max(RANK_TOLERANCE, 4 * self.precision) * len(C)
        v = (V[:, kept] / values[kept]) @ (V[:, kept].T @ self.p)
        projections = R @ v
        squared = float(v @ projections)
        if squared <= RANK_TOLERANCE:  # no direction is at all closer to the gradients than to their opposites
            return np.zeros(len(C))
        return np.asarray(float(n @ projections) / squared * v / n)

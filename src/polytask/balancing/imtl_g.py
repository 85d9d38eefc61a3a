"""IMTL-G: impartial multi-task learning, gradient part (Liu et al., ICLR 2021)."""

from __future__ import annotations

import logging

import numpy as np

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import correlation, min_norm_point
from polytask.registry import register

logger = logging.getLogger(__name__)


@register(
    "imtl_g",
    family="balancing",
    paper="openreview:IMPnRXEWpvr",
    needs="gramian",
    aliases=("IMTLG",),
    invariances=("permutation", "scale", "single"),
)
class IMTLG(GramianWeighting):
    r"""Find the combination whose projections on all task gradients are equal.

    .. math:: v = C^{+} (p \circ n), \quad n_i = \lVert g_i\rVert, \qquad w = v / 1^\top v

    so that :math:`\langle d, g_i / n_i\rangle` is the same for every task (in proportion to p), with weights that sum
    to 1. Weights may be negative; when the sum of v is negative the common projection is too, as in the paper. When it
    vanishes, weights of the shortest vector in the convex hull are used, and the log says so.

    Cost: one K x K eigendecomposition a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        R, n = correlation(C)
        values, V = np.linalg.eigh(R)
        kept = values > max(1e-10, 4 * self.precision) * len(C)
        v = (V[:, kept] / values[kept]) @ (V[:, kept].T @ self.p) * (n.min() / n)
        total = v.sum()
        if abs(total) <= 1e-12 * np.abs(v).sum():
            logger.info(
                "no combination of the %d gradients has equal projections and sum 1: min-norm weights are used",
                len(C),
            )
            return min_norm_point(C, self.precision)
        return np.asarray(v / total)

"""MGDA (Désidéri 2012; Sener & Koltun, NeurIPS 2018, arXiv:1810.04650)."""

from __future__ import annotations

import numpy as np

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import min_norm_point
from polytask.registry import register


@register(
    "mgda",
    family="balancing",
    paper="arXiv:1810.04650",
    needs="gramian",
    aliases=("MGDA_UB", "SMG"),
    invariances=("permutation", "scale", "non_conflict", "single"),
)
class MGDA(GramianWeighting):
    r"""Take the shortest vector in the convex hull of the task gradients.

    .. math:: w = p \circ \arg\min_{u \in \Delta} u^\top P C P u, \qquad P = \mathrm{diag}(p)

    so that :math:`p_i \langle g_i, d\rangle \ge \lVert d\rVert^2` for every task: no task is made worse to first
    order, and d = 0 exactly at
    Pareto-stationary points. A preference scales the gradients before (the weighted form of Momma et al., ICML 2022);
    without one the
    weights sum to 1. At representation level this is MGDA-UB.

    Cost: one active-set solve of K unknowns a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        p = self.p
        return np.asarray(p * min_norm_point(C * p * p[:, None]))

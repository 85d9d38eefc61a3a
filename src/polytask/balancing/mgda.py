"""MGDA (Désidéri 2012; Sener & Koltun, NeurIPS 2018, arXiv:1810.04650)."""

from __future__ import annotations

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import min_norm_point
from polytask.registry import register


@register(
    "mgda",
    family="balancing",
    paper="arXiv:1810.04650",
    needs="gramian",
    aliases=("MGDA_UB",),
    invariances=("permutation", "scale", "non_conflict", "single"),
)
class MGDA(GramianWeighting):
    r"""Take the shortest vector in the convex hull of the task gradients.

    .. math:: w = \arg\min_{w \in \Delta} w^\top C w

    so that :math:`\langle g_i, d\rangle \ge \lVert d\rVert^2` for every task: no task is made worse to first order, and d = 0 exactly at
    Pareto-stationary points. At representation level this is MGDA-UB.

    Cost: one active-set solve of K unknowns a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: D102, ARG002
        return min_norm_point(C)

"""UPGrad: Jacobian descent (Quinton and Rey, 2024, arXiv:2406.16232)."""

from __future__ import annotations

import logging

import numpy as np

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import opposed, project_dual_cone
from polytask.registry import register

logger = logging.getLogger(__name__)

MANY = 20  # tasks from which it is seen first whether there is any such direction


@register(
    "upgrad",
    family="balancing",
    paper="arXiv:2406.16232",
    needs="gramian",
    aliases=("unconflicting_projection",),
    invariances=("permutation", "scale", "non_conflict", "single"),
)
class UPGrad(GramianWeighting):
    r"""Project every task gradient on the cone of directions that oppose no task, and average the projections.

    .. math:: w = \tfrac1K \sum_i \arg\min_{v \ge p_i e_i} v^\top C v

    No threshold, and no regularisation beyond the rounding of the gradients' own precision: the guarantee
    :math:`\langle g_j, d\rangle \ge 0` holds for gradients of any size.

    Where many gradients leave no direction but 0, the weights are those of a sum of 0, as the log says.

    Cost: K active-set solves of at most K unknowns a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        w = opposed(C, self.precision) if len(C) > MANY else None
        if w is not None:
            logger.info("the gradients leave no direction that opposes none: upgrad takes weights of a sum of 0")
            return w
        return np.asarray(project_dual_cone(C, np.diag(self.p / len(C)), self.precision).sum(0))

"""DualProj: project the mean gradient (Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840; named so by TorchJD)."""

from __future__ import annotations

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import project_dual_cone
from polytask.registry import register


@register(
    "dualproj",
    family="balancing",
    paper="arXiv:1706.08840",
    needs="gramian",
    aliases=("dual_projection", "GEM"),
    invariances=("permutation", "scale", "non_conflict", "single"),
)
class DualProj(GramianWeighting):
    r"""Project the mean gradient on the cone of directions that oppose no task.

    .. math:: w = \arg\min_{v \ge p / K} v^\top C v

    Equal weighting wherever the mean opposes no task, else the nearest direction that does not.

    Cost: one active-set solve of K unknowns a step.
    """

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        w: Vector = project_dual_cone(C, (self.p / len(C))[None], self.precision)[0]
        return w

"""Nash-MTL: multi-task learning as a bargaining game (Navon et al., ICML 2022, arXiv:2202.01017)."""

from __future__ import annotations

from polytask.balancing.base import GramianWeighting, Matrix, Vector
from polytask.linalg import fair_weights
from polytask.registry import register


@register(
    "nash_mtl",
    family="balancing",
    paper="arXiv:2202.01017",
    needs="gramian",
    aliases=("nash",),
    invariances=("permutation", "scale", "task_scale", "non_conflict"),
)
class NashMTL(GramianWeighting):
    r"""Take the Nash bargaining solution among the tasks, each bargaining for its own improvement.

    .. math:: C w = p / w, \quad w > 0

    the maximiser of :math:`\sum_i p_i \log \langle g_i, d\rangle` on a ball. Rescaling a task's loss does not change
    the direction, whose length is :math:`\sqrt{\sum_i p_i}` always: it does not shrink as training converges, which is
    why the authors clip the shared gradient to norm 1 (do so through the training loop's ``clip_norm``). At a
    Pareto-stationary point no solution exists; min-norm weights are used there and the log says so.

    Cost: 5 to 12 Newton steps on K unknowns a step.
    """

    degree = -0.5

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        return fair_weights(C, self.p, 1.0, self.precision)

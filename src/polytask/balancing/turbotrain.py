"""TurboTrain's balancer: free steps and conflict-suppressed ones in turn (Zhou et al., ICCV 2025, arXiv:2508.04682)."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np

from polytask.balancing.aligned_mtl import AlignedMTL
from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.pcgrad import PCGrad
from polytask.errors import InputError
from polytask.registry import register


@register(
    "turbotrain",
    family="balancing",
    paper="arXiv:2508.04682",
    needs="gramian",
    aliases=("TurboBalancer", "alternating"),
    invariances=("permutation", "scale", "single"),
)
class TurboTrain(GramianWeighting):
    r"""Add the gradients as they are in some steps, and without their conflict in the others.

    Step t is free, :math:`d = \sum_i p_i g_i`, where :math:`t \bmod P < P - q`. In the others conflict is suppressed: with ``aligned`` the
    gradients are made orthogonal and of equal length, :math:`\tilde G = B G` with

    .. math:: B = \sigma_r \sum_{i \le r} \frac{v_i v_i^\top}{\sigma_i}, \qquad d = (B p)^\top G, \qquad
        GG^\top = V \,\mathrm{diag}(\sigma^2)\, V^\top

    so that no pair of :math:`\tilde g` conflicts. d may still oppose a :math:`g_i` when lengths differ much: alignment is no promise of
    common descent; ``pcgrad`` is, for two tasks.

    Args:
        suppress: what suppresses conflict: ``aligned`` (:class:`~polytask.balancing.aligned_mtl.AlignedMTL`), ``pcgrad``, or
            ``align_if_conflict``, which aligns only where a pair of gradients has a negative product.
        period: P.
        share: q, suppressed steps in a period; 0 is plain joint training.

    Cost: K backward passes a step (free steps included, for their Gramian is observed), one K x K eigendecomposition in suppressed ones.
    How conflict is suppressed, the period and the share are not printed by the paper.
    """

    def __init__(
        self,
        *,
        suppress: Literal["aligned", "pcgrad", "align_if_conflict"] = "aligned",
        period: int = 2,
        share: int = 1,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if suppress not in ("aligned", "pcgrad", "align_if_conflict"):
            raise InputError(f"turbotrain suppresses by 'aligned', 'pcgrad' or 'align_if_conflict', not {suppress!r}")
        if period < 1 or not 0 <= share <= period:
            raise InputError(f"turbotrain suppresses 0 to {period} of {period} steps, not {share}")
        self.suppress, self.period, self.share = suppress, period, share
        self._suppressing = (PCGrad if suppress == "pcgrad" else AlignedMTL)(**base)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:  # noqa: ARG002
        return {"step": 0}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        step = self.state["step"]
        self.state["step"] = step + 1
        conflict = self.suppress != "align_if_conflict" or bool(C.min() < 0)
        if step % self.period < self.period - self.share or not conflict:
            return self.p
        method = self._suppressing
        # the tasks, the generator and the precision are those of this balancer: the method has no state of its own
        method.tasks, method.active, method.rng, method.precision = self.tasks, self.active, self.rng, self.precision
        return np.asarray(method.solve(C, losses))

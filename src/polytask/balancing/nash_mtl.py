"""Nash-MTL: multi-task learning as a bargaining game (Navon et al., ICML 2022, arXiv:2202.01017)."""

from __future__ import annotations

import math
from typing import Unpack

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
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
    why the authors' code, LibMTL and TorchJD clip the shared gradient to length 1. At a Pareto-stationary point no solution
    exists; min-norm weights are used there and the log says so. Their ``update_weights_every`` is ``every`` here.

    Args:
        max_norm: shorten a longer direction to this length, at the level where gradients are taken; None, as in the paper's
            formula, leaves that to the training loop's ``clip_norm``.

    Cost: 5 to 12 Newton steps on K unknowns a step.
    """

    degree = -0.5

    def __init__(self, *, max_norm: float | None = None, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if max_norm is not None and not max_norm > 0:
            raise InputError(f"nash_mtl shortens directions to a positive max_norm, not {max_norm}")
        self.max_norm = max_norm

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        w = fair_weights(C, self.p, 1.0, self.precision)
        if self.max_norm is None:
            return w
        # C and w are scaled against each other: this is the length of the direction itself
        length = math.sqrt(max(float(w @ C @ w), 0.0))
        return w * min(1.0, self.max_norm / length) if length > 0 else w

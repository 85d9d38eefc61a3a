"""CAME-Grad (Zhang et al., ICML 2026, arXiv:2605.22635)."""

from __future__ import annotations

import math
from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import conflict_averse
from polytask.registry import register


@register(
    "came_grad",
    family="balancing",
    paper="arXiv:2605.22635",
    needs="gramian",
    aliases=("CAME", "CAMEGrad"),
    invariances=("permutation", "scale"),
    exempt={"preference_length": "the paper's task weights are used as given, so their size counts"},
)
class CAMEGrad(GramianWeighting):
    r"""Turn the mean gradient away from conflict, give it the energy that conflict took, and blend it with the weighted sum.

    With task weights w, :math:`g_j = \sum_i w_i g_i` and :math:`\mu = \frac1K \sum_i g_i` (equal weights, whatever w is),

    .. math::
        u &= \arg\max_{\lVert u - \mu\rVert \le \rho \lVert\mu\rVert} \min_i \langle g_i, u\rangle
          && \text{direction rectification (CAGrad's problem)} \\
        u_{en} &= \kappa \frac{\lVert g_j\rVert}{\lVert u\rVert + \epsilon}\, u && \text{energy injection} \\
        d &= (1 - \nu)\, u_{en} + \nu\, \kappa\, g_j && \text{fusion}

    so that :math:`\lVert d\rVert \le \kappa\lVert g_j\rVert`. With :math:`\nu = 1` it is :math:`\kappa` times static scalarization.
    Neither u nor d has a non-negative product with every gradient in general; u has the largest least product within its ball.
    Where :math:`\mu = 0` the paper leaves u undefined; d is then :math:`\kappa g_j`.

    Args:
        preference: (of all methods) here the task weights w, **used as given**: their size counts, d is proportional to it. The authors'
            code has 1 for the main task and 4 for the auxiliary ones. Do not multiply the losses by them as well.
        rho: :math:`\rho`, radius of the ball as a share of :math:`\lVert\mu\rVert`, in [0, 1).
        kappa: :math:`\kappa`, gain, at least 1. An Adam-like optimizer cancels a constant gain; plain SGD, or clipping, does not.
        nu: :math:`\nu`, share of the weighted sum, in [0, 1]. Conflict may come back through it.
        eps: :math:`\epsilon`, relative to the root mean square of the gradients' norms.

    Cost: one small convex solve a step. The authors' optimizer is unpublished; this follows the paper's equations 8-14.
    """

    def __init__(
        self, *, rho: float = 0.5, kappa: float = 1.5, nu: float = 0.2, eps: float = 1e-8, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        for name, value, allowed, valid in (
            ("rho", rho, "in [0, 1)", 0 <= rho < 1),
            ("kappa", kappa, "at least 1", 1 <= kappa < np.inf),
            ("nu", nu, "in [0, 1]", 0 <= nu <= 1),
            ("eps", eps, "at least 0", 0 <= eps < np.inf),
        ):
            if not valid:
                raise InputError(f"came_grad takes a {name} {allowed}, not {value}")
        self.rho, self.kappa, self.nu, self.eps = rho, kappa, nu, eps

    @property
    def p(self) -> Vector:
        """The task weights w of the active tasks as they were given, shape (active,)."""
        return self.importance

    def rectify(self, C: Matrix) -> Vector:
        """Stage 1: the coefficients of u, shape (tasks,), from the inner products of the gradients, shape (tasks, tasks)."""
        mean = np.full(len(C), 1 / len(C))
        return mean + conflict_averse(C, mean, self.rho)

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        w, kappa, nu = self.p, self.kappa, self.nu
        u = self.rectify(C)
        norm_u, norm_joint = _norm(u, C), _norm(w, C)
        if norm_u <= (np.finfo(np.float64).eps * float(np.diag(C).max())) ** 0.5:  # the mean gradient is zero
            return kappa * w
        u_en = kappa * norm_joint / (norm_u + self.eps) * u
        return np.asarray((1 - nu) * u_en + nu * kappa * w)


def _norm(coefficients: Vector, C: Matrix) -> float:
    """The length of sum_i c_i g_i."""
    return math.sqrt(max(float(coefficients @ C @ coefficients), 0.0))

"""IMGrad: imbalance-sensitive gradient descent (Zhou, Liu, Zhao and Gong, IJCAI 2025, arXiv:2503.08006)."""

from __future__ import annotations

import math
from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import conflict_averse, min_norm_point
from polytask.registry import register

LEAST_RADIUS = 1e-6


@register(
    "imgrad",
    family="balancing",
    paper="arXiv:2503.08006",
    needs="gramian",
    aliases=("imbalance_sensitive_gradient",),
    invariances=("permutation", "scale"),
)
class IMGrad(GramianWeighting):
    r"""CAGrad whose pull towards the worst-off task grows as the mean gradient turns away from MGDA's.

    .. math:: w = \arg\min_{w \in \Delta} (\tfrac32 - \cos\theta)\, \langle g_w, g_0\rangle
        + \cos\theta\; c \lVert g_0\rVert \lVert g_w\rVert, \qquad
        d = g_0 + c \lVert g_0\rVert \frac{g_w}{\lVert g_w\rVert}

    with :math:`g_0 = \frac1K \sum_i p_i g_i` and :math:`\theta` its angle with the shortest vector in the convex hull of the
    gradients: a small cosine tells of imbalance. CAGrad's problem with the radius
    :math:`c \cos\theta / (\tfrac32 - \cos\theta)`, its solution stretched to the length that c gives. The factors are those of
    the authors' code for three tasks (its form for two lacks a bracket).

    Args:
        c: radius of the ball; CAGrad's.
        rescale: divide by :math:`1 + c^2`, as the authors' code does to keep the length of a step.

    Cost: a handful of K x K active-set solves a step.
    """

    def __init__(self, *, c: float = 0.5, rescale: bool = False, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not c >= 0:
            raise InputError(f"the radius c of imgrad is at least 0, not {c}")
        self.c, self.rescale = c, rescale

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        u, m = self.p / len(C), min_norm_point(C, self.precision)
        lengths = math.sqrt(max(float(u @ C @ u) * float(m @ C @ m), 0.0))
        cos = min(max(float(u @ C @ m) / lengths, 0.0), 1.0) if lengths > 0 else 0.0
        radius = max(self.c * cos / (1.5 - cos), LEAST_RADIUS)
        w = u + self.c / radius * conflict_averse(C, u, radius, self.precision)
        return np.asarray(w / (1 + self.c**2)) if self.rescale else w

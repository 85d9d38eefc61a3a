"""CAGrad: conflict-averse gradient descent (Liu et al., NeurIPS 2021, arXiv:2110.14048)."""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import conflict_averse
from polytask.registry import register


@register(
    "cagrad",
    family="balancing",
    paper="arXiv:2110.14048",
    needs="gramian",
    aliases=("conflict_averse",),
    invariances=("permutation", "scale"),
)
class CAGrad(GramianWeighting):
    r"""Improve the worst-off task as much as a ball around the mean gradient allows.

    .. math:: d = \arg\max_d \min_i \langle g_i, d\rangle \quad \text{s.t.} \quad \lVert d - g_0\rVert \le c \lVert g_0\rVert,
        \qquad g_0 = \tfrac1K \sum_i p_i g_i

    c = 0 is the mean; towards infinity the direction becomes MGDA's.

    Args:
        c: radius of the ball; the paper's experiments use 0.4 and 0.5.
        rescale: what d is divided by to keep the length of a step. 0: by 1, as in the paper and TorchJD; 1: by :math:`1 + c^2`, the
            default of the authors' code and LibMTL; 2: by :math:`1 + c`, after which no step is longer than the mean.

    Cost: a handful of K x K active-set solves a step.
    """

    def __init__(self, *, c: float = 0.5, rescale: Literal[0, 1, 2] = 0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not c >= 0:
            raise InputError(f"the radius c of cagrad is at least 0, not {c}")
        if rescale not in (0, 1, 2):
            raise InputError(f"cagrad divides by 1, 1 + c^2 or 1 + c for rescale=0, 1 or 2, not {rescale!r}")
        self.c, self.rescale = c, rescale

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        u = self.p / len(C)
        w = u + conflict_averse(C, u, self.c, self.precision)
        return np.asarray(w / (1.0, 1 + self.c**2, 1 + self.c)[self.rescale])

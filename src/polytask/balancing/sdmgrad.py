"""SDMGrad: direction-oriented multi-objective learning (Xiao, Ban and Ji, NeurIPS 2023, arXiv:2305.18409)."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import simplex_qp
from polytask.registry import register


@register(
    "sdmgrad",
    family="balancing",
    paper="arXiv:2305.18409",
    needs="gramian",
    invariances=("permutation", "scale", "single"),
)
class SDMGrad(GramianWeighting):
    r"""Take the common descent direction nearest to the mean gradient.

    .. math:: w = \arg\min_{w \in \Delta} \tfrac12 w^\top C w + \lambda\, w^\top C\, 1 / K, \qquad
        d = \frac{\sum_i (w_i + \lambda / K)\, g_i}{1 + \lambda}

    :math:`\lambda = 0` is MGDA, :math:`\lambda \to \infty` the mean. The problem is solved exactly on the gradients of
    one batch; the paper takes steps towards its solution with C estimated from two further batches, which makes those
    steps free of bias. A preference scales the gradients before.

    Args:
        lam: :math:`\lambda`, pull towards the mean; 0.3 as in LibMTL.

    Cost: a few active-set solves of K unknowns a step.
    """

    def __init__(self, *, lam: float = 0.3, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not lam >= 0:
            raise InputError(f"the pull lam of sdmgrad is at least 0, not {lam}")
        self.lam = lam

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        p, k = self.p, len(C)
        C = C * p * p[:, None]
        w = simplex_qp(C, self.lam * C.mean(1), self.precision)
        return np.asarray(p * (w + self.lam / k) / (1 + self.lam))

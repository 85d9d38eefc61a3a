"""MGDA (Désidéri 2012; Sener & Koltun, NeurIPS 2018, arXiv:1810.04650)."""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import min_norm_point
from polytask.registry import register


@register(
    "mgda",
    family="balancing",
    paper="arXiv:1810.04650",
    needs="gramian",
    aliases=("MGDA_UB", "SMG"),
    invariances=("permutation", "scale", "non_conflict", "single"),
)
class MGDA(GramianWeighting):
    r"""Take the shortest vector in the convex hull of the task gradients.

    .. math:: w = f \circ \arg\min_{u \in \Delta} u^\top F C F u, \qquad F = \mathrm{diag}(f)

    with :math:`f = p`, so that :math:`f_i \langle g_i, d\rangle \ge \lVert d\rVert^2` for every task: no task is made
    worse to first order, and d = 0 exactly at Pareto-stationary points. A preference scales the gradients before (the
    weighted form of Momma et al., ICML 2022); without one the weights sum to 1. At representation level this is
    MGDA-UB; with ``every=4`` or so, which keeps the weights for some steps, PSMGD (arXiv:2412.10961).

    Args:
        normalization: what each gradient is divided by before: ``none``, its length (``l2``), its loss (``loss``), or
            both (``loss+``).

    Cost: one active-set solve of K unknowns a step.
    """

    def __init__(
        self, *, normalization: Literal["none", "l2", "loss", "loss+"] = "none", **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if normalization not in ("none", "l2", "loss", "loss+"):
            raise InputError(f"mgda normalizes by 'none', 'l2', 'loss' or 'loss+', not {normalization!r}")
        self.normalization = normalization
        self.degree = -0.5 if normalization in ("l2", "loss+") else 0.0

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        f = self.p
        if self.normalization in ("l2", "loss+"):
            f = f / np.sqrt(np.diag(C))
        if self.normalization in ("loss", "loss+"):
            if losses is None:
                raise InputError(f"mgda with normalization={self.normalization!r} divides by the losses: give losses=")
            f = f / np.maximum(losses, np.finfo(np.float64).tiny)
        return np.asarray(f * min_norm_point(C * f * f[:, None], self.precision))

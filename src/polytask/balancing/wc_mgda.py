"""WC-MGDA: weighted Chebyshev MGDA (Momma, Dong and Liu, ICML 2022)."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.ray import losses_for_ray
from polytask.errors import InputError
from polytask.linalg import correlation, definite, worst_raised
from polytask.registry import register


@register(
    "wc_mgda",
    family="balancing",
    paper="https://proceedings.mlr.press/v162/momma22a.html",
    needs="gramian",
    aliases=("weighted_chebyshev_mgda",),
    invariances=("permutation", "scale", "single"),
)
class WCMGDA(GramianWeighting):
    r"""Attend to the losses that stand furthest out from the ray of the preference, as far as the gradients agree.

    .. math:: \max_{\alpha \in \Delta}\; \frac{\alpha^\top \ell}{\max \ell} - u\, \frac{\sqrt{\alpha^\top C_r \alpha}}
        {\sqrt{\lambda_{\max}(C_r)}}, \qquad \ell = r \circ L, \quad C_r = (r r^\top) \circ C, \quad r = 1/p, \qquad
        w = r \circ \alpha

    u = 0 is the (weighted) Chebyshev scalarization, which ends where the losses are in proportion to p; towards infinity it is
    MGDA on the weighted losses. Losses and gradients are each measured by the largest. The preference is a **ray**: a larger
    number lets a task end with a larger loss.

    Args:
        u: trade-off, at least 0; 0.01 as in the authors' code.

    Cost: a few active-set solves of K unknowns a step.
    """

    def __init__(self, *, u: float = 0.01, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not 0 <= u < np.inf:
            raise InputError(f"the trade-off u of wc_mgda is at least 0, not {u}")
        self.u = u

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        r = 1 / self.p
        l_r = r * losses_for_ray(self, losses)
        C_r = C * r * r[:, None]
        k = float(np.sqrt(np.linalg.eigvalsh(C_r)[-1]))
        return r * _least(C_r / k**2, 1 - l_r / l_r.max(), self.u, self.precision)


def _least(C: Matrix, b: Vector, u: float, precision: float) -> Vector:
    r"""Minimise :math:`b^\top \alpha + u \lVert\alpha\rVert_C` over the simplex; b is known up to a constant, its least number being 0."""
    worst = b == b.min()
    alone = np.asarray(worst / worst.sum())
    if u == 0:
        return alone
    R, n = correlation(C)
    a, beta = n.min() / n, b / n
    y = worst_raised(definite(R, precision), a, beta, u, float(((beta + u) / a).min()))
    # where losses and lengths spread beyond the numbers' range no support is found
    return y * a / (y @ a) if y.any() else alone

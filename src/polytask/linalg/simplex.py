"""Problems on the simplex."""

from __future__ import annotations

import numpy as np

from polytask.linalg.complementarity import nonnegative_qp
from polytask.linalg.scaling import DOUBLE, Matrix, Vector, correlation, definite


def min_norm_point(C: Matrix, precision: float = DOUBLE) -> Vector:
    r"""Weights of the shortest vector in a convex hull.

    .. math:: w = \arg\min_{w \ge 0,\, 1^\top w = 1} w^\top C w

    Solved as :math:`v \ge 0 \perp Cv - 1 \ge 0`, :math:`w = v / 1^\top v`, by an active-set method on unit vectors, so
    that lengths may differ by many orders of magnitude.

    Args:
        C: inner products of the vectors, shape (tasks, tasks), not all zero on the diagonal.
        precision: relative rounding of C's entries.

    Returns:
        w, shape (tasks,), non-negative, summing to 1; a vector of length zero takes all weight.
        Cost: a few K x K linear solves.

    Source: Wolfe, Mathematical Programming 11 (1976), for the problem; see :func:`nonnegative_qp` for the method.
    """
    zero = np.diag(C) <= 0
    if zero.any():
        return np.asarray(zero / zero.sum())
    R, n = correlation(C)
    a = n.min() / n
    y = nonnegative_qp(definite(R, precision), -a[None])[0]
    w = y * a
    return np.asarray(w / w.sum())


def project_simplex(v: Vector, total: float = 1.0) -> Vector:
    r"""The nearest point of the simplex :math:`\{w \ge 0, 1^\top w = \text{total}\}`, shape (tasks,).

    Cost: one sort. Source: Held, Wolfe and Crowder, Mathematical Programming 6 (1974).
    """
    descending = np.sort(v)[::-1]
    excess = np.cumsum(descending) - total
    count = np.arange(1, len(v) + 1)
    last = np.flatnonzero(descending * count > excess)[-1]
    return np.asarray(np.maximum(v - excess[last] / count[last], 0.0))


def simplex_qp(C: Matrix, b: Vector, precision: float = DOUBLE) -> Vector:
    r"""Minimise :math:`\tfrac12 w^\top C w + b^\top w` over the simplex.

    With multiplier :math:`\tau`, :math:`w \ge 0 \perp Cw + b - \tau \ge 0`, and :math:`1^\top w` grows with
    :math:`\tau`, linearly on each set of positive coordinates: a safeguarded Newton method on :math:`\tau` ends when
    the set no longer changes.

    Args:
        C: inner products of non-zero vectors, shape (tasks, tasks).
        b: linear term, shape (tasks,).
        precision: relative rounding of C's entries.

    Returns:
        w, shape (tasks,), non-negative, summing to 1. Cost: a few K x K linear solves.
    """
    R, n = correlation(C)
    unit = n.min()
    alpha, beta = unit / n, b / n / unit
    # a multiple of (1'w)^2 is constant on the simplex, and keeps the sum from jumping where C is singular
    M = definite(R, precision) + np.outer(alpha, alpha)
    low, high, tau = float((beta / alpha).min()), np.inf, float((beta / alpha).max()) + 1.0
    y = np.zeros(len(b))
    for _ in range(100):
        y = nonnegative_qp(M, (beta - tau * alpha)[None], (y > 0)[None] if y.any() else None)[0]
        support = np.flatnonzero(y > 0)
        total = float(alpha @ y)
        low, high = (tau, high) if total < 1 else (low, tau)
        if abs(total - 1) <= 1e-13:
            break
        slope = (
            float(alpha[support] @ np.linalg.solve(M[np.ix_(support, support)], alpha[support]))
            if len(support)
            else 0.0
        )
        if slope > 0 and abs(1 - total) <= slope * abs(tau) * DOUBLE:
            break  # tau has no finer digits: the sum is as near to 1 as it gets
        tau = tau + (1 - total) / slope if slope > 0 else np.inf
        if not low < tau < high:
            tau = (low + high) / 2 if np.isfinite(high) else 2 * abs(low) + 1.0
    w = y * alpha
    return np.asarray(w / w.sum())

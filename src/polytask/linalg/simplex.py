"""Problems on the simplex."""

from __future__ import annotations

import numpy as np

from polytask.linalg.complementarity import nonnegative_qp
from polytask.linalg.scaling import Matrix, Vector, correlation, definite


def min_norm_point(C: Matrix) -> Vector:
    r"""Weights of the shortest vector in a convex hull.

    .. math:: w = \arg\min_{w \ge 0,\, 1^\top w = 1} w^\top C w

    Solved as :math:`v \ge 0 \perp Cv - 1 \ge 0`, :math:`w = v / 1^\top v`, by an active-set method on unit vectors, so
    that lengths may differ by many
    orders of magnitude.

    Args:
        C: inner products of the vectors, shape (tasks, tasks), not all zero on the diagonal.

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
    y = nonnegative_qp(definite(R), -a[None])[0]
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

"""Projections on the dual cone of some vectors: the directions that oppose none of them."""

from __future__ import annotations

import numpy as np

from polytask.linalg.complementarity import nonnegative_qp
from polytask.linalg.scaling import DOUBLE, Matrix, correlation, definite


def project_dual_cone(C: Matrix, U: Matrix, precision: float = DOUBLE) -> Matrix:
    r"""The nearest points to combinations of vectors :math:`g_j` among the directions d with
    :math:`\langle g_j, d\rangle \ge 0` for all j.

    .. math:: v_i = \arg\min_{v \ge u_i} v^\top C v

    makes :math:`\sum_j v_{ij} g_j` the projection of :math:`\sum_j u_{ij} g_j`.

    Args:
        C: inner products of non-zero vectors g, shape (tasks, tasks).
        U: coefficients of the points to be projected, one a row, shape (points, tasks).
        precision: relative rounding of C's entries.

    Returns:
        V, coefficients of the projections, shape (points, tasks). Cost: a few linear solves a point.

    Source: Quinton and Rey (arXiv:2406.16232), proposition 1.
    """
    R, n = correlation(C)
    T = U * n
    size = np.abs(T).max(1, keepdims=True)
    size[size == 0] = 1.0
    Z = nonnegative_qp(definite(R, precision), T / size @ R)
    return np.asarray(U + Z * size / n)

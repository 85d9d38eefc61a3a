"""Gradients that leave no direction."""

from __future__ import annotations

import numpy as np

from polytask.linalg.scaling import DOUBLE, Matrix, Vector, correlation, ridge
from polytask.linalg.simplex import min_norm_point

STATIONARY = 1e-12  # squared length of the shortest vector in the hull of unit gradients
DEPENDENT = 1e-6  # squared distance of a unit gradient from what others span
ATTEMPTS = 30
TINY = float(np.finfo(np.float64).tiny)


def opposed(C: Matrix, precision: float = DOUBLE) -> Vector | None:
    r"""Weights with :math:`\sum_i w_i g_i = 0` that prove 0 the only d with :math:`\langle g_i, d\rangle \ge 0` for all i.

    Such products are 0 where :math:`w_i > 0`, and all are where those gradients span the others.

    Args:
        C: inner products of non-zero vectors, shape (tasks, tasks).
        precision: relative rounding of C's entries.

    Returns:
        w, shape (tasks,), non-negative, summing to 1; None where there is such a d, or where rounding hides that there is none.
        Cost: a Cholesky factorisation; where gradients are linearly dependent an active-set solve and an eigendecomposition.

    Source: Gordan's theorem of alternatives (1873).
    """
    R, n = correlation(C)
    if _some_direction(R):
        return None
    try:
        if np.linalg.cholesky(R).diagonal().min() ** 2 > DEPENDENT:
            return None
    except np.linalg.LinAlgError:
        pass
    u, least = min_norm_point(R, precision), ridge(len(C), precision)
    if u @ R @ u > max(STATIONARY, least):
        return None
    P = u > 100 * least * u.max()  # less than that a ridge gives to any
    values, V = np.linalg.eigh(R[np.ix_(P, P)])
    kept = values > least
    across = V[:, kept].T @ R[np.ix_(P, ~P)]
    if (1 - (across**2 / values[kept, None]).sum(0) > max(DEPENDENT, 100 * precision)).any():
        return None
    return np.asarray(u / n / (u / n).sum())


def _some_direction(R: Matrix) -> bool:
    """Whether some steps towards positive products with all unit vectors get there."""
    y, products = np.ones(len(R)), R.sum(1)
    for _ in range(ATTEMPTS):
        if products.min() > DEPENDENT * y.sum():
            return True
        lacking = np.maximum(0.2 * np.abs(products).mean() - products, 0.0)
        gained = R @ lacking
        length = float(lacking @ gained) / max(float(gained @ gained), TINY)
        y += length * lacking
        products += length * gained
    return False

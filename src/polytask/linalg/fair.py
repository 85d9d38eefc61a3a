"""Fair combinations: the weights at which every task's improvement is a given power of its weight."""

from __future__ import annotations

import logging

import numpy as np

from polytask.linalg.scaling import DOUBLE, Matrix, Vector, correlation, definite, ridge
from polytask.linalg.simplex import min_norm_point

logger = logging.getLogger(__name__)

RELATIVE_RESIDUAL = 1e-11
ROUNDING = 8 * float(np.finfo(np.float64).eps)
SUSPICIOUS = 1e4  # a solution beyond this may be no solution: look whether 0 lies in the convex hull
STATIONARY = 1e-12
MAX_STEPS = 100
LEAST_SHARE = 1e-30


def fair_weights(C: Matrix, p: Vector, alpha: float, precision: float = DOUBLE) -> Vector:
    r"""Solve :math:`Cw = p \circ w^{-1/\alpha}` for w > 0.

    This is the stationarity condition of a strictly convex problem,

    .. math:: \min_{w > 0}\; \tfrac12 w^\top C w - \sum_i p_i U(w_i), \qquad U'(w) = w^{-1/\alpha},

    solved by a damped Newton method in the unknowns :math:`y_i = w_i / C_{ii}^{-\alpha/(1+\alpha)}`, which are all 1
    for orthogonal gradients whatever their lengths. :math:`\alpha = 1` is the Nash bargaining solution.

    Args:
        C: inner products of non-zero gradients, shape (tasks, tasks).
        p: positive importance, shape (tasks,).
        alpha: fairness, positive; towards 0 the plain sum, towards infinity max-min.
        precision: relative rounding of C's entries.

    Returns:
        w, shape (tasks,). Where the convex hull of the gradients holds 0 (a Pareto-stationary point) no solution
        exists: the weights of
        the shortest vector are returned, and the log says so; so too where lengths spread so far that alpha's power of
        them leaves the range of the numbers. Cost: usually 4 to 10 Newton steps of one K x K solve each.
    """
    R, n = correlation(C)
    e = 1.0 / alpha
    tau = n ** (-2 * alpha / (1 + alpha))
    s = n ** ((1 - alpha) / (1 + alpha))
    M = definite(R, precision) * s * s[:, None]  # T C T, with diagonal q = s^2
    q = p * s**2
    y = _start(M, q, e)
    looked = False
    for _ in range(MAX_STEPS):
        wanted = q * y**-e
        residual = M @ y - wanted
        if not looked and y.max() > SUSPICIOUS:
            looked = True
            u = min_norm_point(R, precision)
            if u @ R @ u <= max(STATIONARY, 10 * ridge(len(C), precision)):
                logger.info("zero lies between the %d gradients (Pareto stationary): min-norm weights are used", len(C))
                return min_norm_point(C, precision)
        if (np.abs(residual) <= RELATIVE_RESIDUAL * wanted + ROUNDING * (np.abs(M) @ y)).all():
            return np.asarray(tau * y)
        y = _newton_step(M, q, e, y, residual)
    logger.info("no fair weights of %d gradients found in %d steps: min-norm weights are used", len(C), MAX_STEPS)
    return min_norm_point(C, precision)


def _start(M: Matrix, q: Vector, e: float) -> Vector:
    """Equal y, of the length that is stationary along the ray; less where the others alone give a task more than is wanted."""
    together = max(float(M.sum()), 1e-12 * float(np.trace(M)))
    y = np.full(len(q), (q.sum() / together) ** (1 / (1 + e)))
    excess = np.maximum((M @ y) / (q * y**-e), 1.0)
    return np.asarray(y * np.maximum(excess ** (-1 / e), LEAST_SHARE))


def _newton_step(M: Matrix, q: Vector, e: float, y: Vector, residual: Vector) -> Vector:
    # the change of variable by h^-1/2 keeps the system well conditioned where curvatures differ by decades
    r = 1 / np.sqrt(q * e * y ** (-e - 1))
    step = -r * np.linalg.solve(np.eye(len(q)) + M * r * r[:, None], r * residual)
    slope = float(residual @ step)
    shrink = (-step / y).max()
    t = min(1.0, 0.98 / shrink) if shrink > 0 else 1.0
    if -slope <= 1e-8 * float(q @ y ** (1 - e)):
        return np.asarray(y + t * step)  # within the quadratic region, where rounding would mislead the line search
    value = _objective(M, q, e, y)
    while _objective(M, q, e, y + t * step) > value + 1e-4 * t * slope and t > 1e-12:
        t /= 2
    return np.asarray(y + t * step)


def _objective(M: Matrix, q: Vector, e: float, y: Vector) -> float:
    utility = np.log(y) if e == 1 else y ** (1 - e) / (1 - e)
    return float(0.5 * y @ M @ y - q @ utility)

"""The best worst-case improvement within a ball around a given direction."""

from __future__ import annotations

import numpy as np

from polytask.linalg.complementarity import nonnegative_qp
from polytask.linalg.scaling import DOUBLE, Matrix, Vector, correlation, definite

RELATIVE_TOLERANCE = 1e-12
EXCHANGES = 12
ASCENTS = 60
LOOSE = 1e-9


def conflict_averse(C: Matrix, u: Vector, c: float, precision: float = DOUBLE) -> Vector:
    r"""Coefficients of the x that maximises the least improvement :math:`\min_i \langle g_i, g_u + x\rangle` within
    :math:`\lVert x\rVert \le c \lVert g_u\rVert`.

    With :math:`b = Cu`, the shortest x that improves every task by :math:`\tau` is :math:`x = \sum_i v_i g_i`,
    :math:`v \ge 0 \perp Cv + b - \tau \ge 0`. Its length is convex and increasing in :math:`\tau`, and on each set of
    positive coordinates the :math:`\tau` of a wanted length solves a quadratic equation. Supports and :math:`\tau` are exchanged
    together at first; where that cycles, :math:`\tau` rises from where x is 0, one coordinate at a time, to the wanted length; and where
    that is far, a Newton method comes down from above and ends after a few supports.

    Args:
        C: inner products of non-zero vectors, shape (tasks, tasks).
        u: coefficients of the centre :math:`g_u`, shape (tasks,).
        c: radius as a multiple of the centre's length, at least 0.
        precision: relative rounding of C's entries.

    Returns:
        v, shape (tasks,), non-negative: the direction is :math:`\sum_i (u_i + v_i) g_i`. Cost: a few linear solves.
    """
    R, n = correlation(C)
    M = definite(R, precision)
    t = u * n
    size = np.sqrt(max(float(t @ M @ t), 0.0))
    radius = c * size
    if radius <= RELATIVE_TOLERANCE * float(np.abs(t).sum()):
        return np.zeros(len(u))
    # in unit vectors: M y + beta - tau alpha >= 0, with tau measured along the shortest vector
    alpha, beta = n.min() / n, M @ t
    centre = float(alpha @ t)
    tau = (size**2 + radius * size) / centre if centre > 0 else np.inf
    return np.asarray(worst_raised(M, alpha, beta, radius, tau) / n)


def worst_raised(M: Matrix, alpha: Vector, beta: Vector, radius: float, tau: float) -> Vector:
    r"""The y of a given length with :math:`y \ge 0 \perp My + \beta - \tau\alpha \ge 0` for some :math:`\tau`.

    It is the direction that raises :math:`\min_i (My + \beta)_i / \alpha_i` most, and minimises
    :math:`\beta^\top y + \text{radius} \lVert y\rVert_M` on the rays of :math:`\alpha^\top y = 1`.

    Args:
        M: positive definite with entries of order 1, shape (tasks, tasks).
        alpha: positive, shape (tasks,).
        beta: shape (tasks,).
        radius: the wanted :math:`\lVert y\rVert_M`, positive.
        tau: where to start: above :math:`\min_i \beta_i / \alpha_i`.

    Returns:
        y, shape (tasks,), non-negative. Cost: a few linear solves.
    """
    for method in (_exchange, _ascend):
        found = method(M, alpha, beta, radius)
        if found is not None:
            return found
    y = np.zeros(len(beta))
    for _ in range(50):
        y = nonnegative_qp(M, (beta - tau * alpha)[None], None if not y.any() else (y > 0)[None])[0]
        support = np.flatnonzero(y > 0)
        if not len(support):
            break
        before, tau = tau, _tau_of_length(M, alpha, beta, support, radius)[0]
        if abs(tau - before) <= RELATIVE_TOLERANCE * max(abs(tau), abs(before)):
            break
    return y


def _exchange(M: Matrix, alpha: Vector, beta: Vector, radius: float) -> Vector | None:
    """Guess the support, take the tau of the right length, exchange coordinates of the wrong sign; None where that cycles."""
    free = np.ones(len(alpha), dtype=bool)
    for _ in range(EXCHANGES):
        support = np.flatnonzero(free)
        if not len(support):
            break
        tau, on_support = _tau_of_length(M, alpha, beta, support, radius)
        y = np.zeros(len(alpha))
        y[support] = on_support
        slack = M @ y + beta - tau * alpha
        tolerance = RELATIVE_TOLERANCE * max(float(np.abs(y).max()), float(np.abs(beta).max()))
        wrong = np.where(free, y < -tolerance, slack < -tolerance)
        if not wrong.any():
            # without a real root the length of tau is not the radius on this support
            return np.maximum(y, 0.0) if abs(float(y @ M @ y) - radius**2) <= LOOSE * radius**2 else None
        free ^= wrong
    return None


def _ascend(M: Matrix, alpha: Vector, beta: Vector, radius: float) -> Vector | None:
    """Let tau rise from where y is 0, and follow y to the wanted length; None where that takes many supports, or rounding misleads it."""
    tau, square, free = float((beta / alpha).min()), 0.0, np.zeros(len(alpha), dtype=bool)
    u = beta - tau * alpha  # y on the support, the slack elsewhere
    i = int((beta / alpha).argmin())
    for _ in range(ASCENTS):
        free[i], u[i] = not free[i], 0.0
        support = np.flatnonzero(free)
        if not len(support):
            break
        p = np.linalg.solve(M[support[:, None], support], alpha[support])
        rise = M[:, support] @ p - alpha
        rise[support] = p
        # |y + t p|^2 = square + 2 b t + a t^2 with Mp = alpha on the support
        a, b, lacking = float(alpha[support] @ p), float(alpha[support] @ u[support]), radius**2 - square
        root = max(b * b + a * lacking, 0.0) ** 0.5
        if not b + root > 0:
            break
        wanted = lacking / (b + root)
        ends = np.full(len(u), np.inf)
        np.divide(u, -rise, out=ends, where=rise < 0)
        i = int(ends.argmin())
        t = min(wanted, max(float(ends[i]), 0.0))
        tau, square = tau + t, square + (2 * b + a * t) * t
        u += t * rise
        if t == wanted:
            y = np.maximum(np.where(free, u, 0.0), 0.0)
            slack = M @ y + beta - tau * alpha
            tolerance = LOOSE * max(float(y.max()), float(np.abs(beta).max()))
            return y if np.where(free, -np.abs(slack), slack).min() >= -tolerance else None
    return None


def _tau_of_length(
    M: Matrix, alpha: Vector, beta: Vector, support: np.typing.NDArray[np.intp], radius: float
) -> tuple[float, Vector]:
    """The larger tau at which y = tau * p - q, on this support, has the wanted length; and that y."""
    right = np.stack([alpha[support], beta[support]], 1)
    pq = np.linalg.solve(M[support[:, None], support], right)
    (a, b), (_, d) = (right.T @ pq).tolist()
    # a tau^2 - 2 b tau + d = radius^2
    tau = (b + max(b * b - a * (d - radius**2), 0.0) ** 0.5) / a
    return tau, tau * pq[:, 0] - pq[:, 1]

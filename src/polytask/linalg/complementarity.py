"""Quadratic programs over the non-negative orthant, many with one matrix at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix, Vector

Mask = npt.NDArray[np.bool_]

RELATIVE_TOLERANCE = 1e-12
BATCHED_UP_TO = 24
PIVOT_ROUNDS = 12
GUESS_ROUNDS = 10


def nonnegative_qp(M: Matrix, Q: Matrix, free: Mask | None = None) -> Matrix:
    r"""Minimise :math:`\tfrac12 z^\top M z + q^\top z` over :math:`z \ge 0` for every row q of Q.

    Block principal pivoting: guess which coordinates are free, solve for them, exchange every coordinate of the wrong
    sign. Rows for which a dozen exchanges do not suffice (degenerate ones, mostly) go through Lawson and Hanson's
    method one by one.

    Args:
        M: positive definite with entries of order 1, shape (n, n).
        Q: one linear term a row, shape (problems, n).
        free: a first guess of the coordinates that end positive, shape (problems, n).

    Returns:
        Z, shape (problems, n), exact up to rounding: :math:`z \ge 0`, :math:`Mz + q \ge 0`, complementary.
        Cost: usually 2 to 4 linear solves a row.

    Source: Júdice and Pires, Computers & Operations Research 21 (1994); Lawson and Hanson, Solving Least Squares
    Problems (1974).
    """
    free = _guess(M, Q) if free is None else free.copy()
    Z = np.zeros_like(Q)
    todo = np.arange(len(Q))
    size = np.abs(Q).max(1, initial=0.0)
    for _ in range(PIVOT_ROUNDS):
        F = free[todo]
        Z[todo] = z = _solve_free(M, Q[todo], F)
        slack = z @ M + Q[todo]
        tolerance = RELATIVE_TOLERANCE * np.maximum(size[todo], np.abs(z).max(1))[:, None]
        wrong = np.where(F, z < -tolerance, slack < -tolerance)
        open_ = wrong.any(1)
        todo = todo[open_]
        if not len(todo):
            break
        free[todo] ^= wrong[open_]
    for row in todo:
        Z[row] = _lawson_hanson(M, Q[row])
    return np.maximum(Z, 0.0)


def _guess(M: Matrix, Q: Matrix) -> Mask:
    """The coordinates that look free after one descent step or, where a solve is dear, several projected ones."""
    if len(Q) == 1 or Q.shape[1] <= BATCHED_UP_TO:
        return np.asarray(Q < 0)
    step = 1 / float(np.linalg.eigvalsh(M)[-1])
    Z = np.maximum(-step * Q, 0.0)
    ahead, momentum = Z, 1.0
    for _ in range(GUESS_ROUNDS):
        before, Z = Z, np.maximum(ahead - step * (ahead @ M + Q), 0.0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = Z + (momentum - 1) / following * (Z - before)
        momentum = following
    return np.asarray(Z > 0)


def _lawson_hanson(M: Matrix, q: Vector) -> Vector:
    """One row: coordinates enter one at a time, and leave when they would turn negative."""
    z, free = np.zeros(len(q)), np.zeros(len(q), dtype=bool)
    for _ in range(3 * len(q)):
        slack = np.where(free, np.inf, M @ z + q)
        entering = slack.argmin()
        if slack[entering] >= -RELATIVE_TOLERANCE * max(float(np.abs(q).max()), float(z.max())):
            break
        free[entering] = True
        while True:
            target = _solve_free(M, q[None], free[None])[0]
            blocking = free & (target <= 0)
            if not blocking.any():
                z = target
                break
            z += (z[blocking] / (z[blocking] - target[blocking])).min() * (target - z)
            free &= z > 1e-15 * z.max()
            z[~free] = 0.0
        if not free[entering]:  # it came in by rounding alone
            break
    return z


def _solve_free(M: Matrix, Q: Matrix, F: Mask) -> Matrix:
    """z with (Mz + q)_F = 0 and z = 0 elsewhere, for every row."""
    Z = np.zeros_like(Q)
    if Q.shape[1] <= BATCHED_UP_TO:
        # one batched call over matrices padded with the identity beats a loop of small ones
        padded = np.where(F[:, :, None] & F[:, None, :], M, np.eye(Q.shape[1]))
        return np.asarray(np.linalg.solve(padded, np.where(F, -Q, 0.0)[:, :, None])[:, :, 0])
    for row, (q, mask) in enumerate(zip(Q, F, strict=True)):
        index = np.flatnonzero(mask)
        if len(index):
            Z[row, index] = np.linalg.solve(M[index[:, None], index], -q[index])
    return Z

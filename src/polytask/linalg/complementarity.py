"""Quadratic programs over the non-negative orthant, many with one matrix at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix

Mask = npt.NDArray[np.bool_]

RELATIVE_TOLERANCE = 1e-12
BATCHED_UP_TO = 24


def nonnegative_qp(M: Matrix, Q: Matrix, free: Mask | None = None) -> Matrix:
    r"""Minimise :math:`\tfrac12 z^\top M z + q^\top z` over :math:`z \ge 0` for every row q of Q.

    Block principal pivoting: guess which coordinates are free, solve for them, exchange every coordinate of the wrong
    sign, and exchange
    one by one when that does not shrink their number (which ends after finitely many steps for any positive definite
    M).

    Args:
        M: positive definite with entries of order 1, shape (n, n).
        Q: one linear term a row, shape (problems, n).
        free: a first guess of the coordinates that end positive, shape (problems, n).

    Returns:
        Z, shape (problems, n), exact up to rounding: :math:`z \ge 0`, :math:`Mz + q \ge 0`, complementary.
        Cost: usually 2 to 6 linear solves a row.

    Source: Júdice and Pires, Computers & Operations Research 21 (1994).
    """
    free = Q < 0 if free is None else free.copy()
    Z = np.zeros_like(Q)
    todo = np.arange(len(Q))
    fewest = np.full(len(Q), Q.shape[1] + 1)
    patience = np.full(len(Q), 3)
    size = np.abs(Q).max(1, initial=0.0)
    for _ in range(20 + 10 * Q.shape[1]):
        F = free[todo]
        Z[todo] = z = _solve_free(M, Q[todo], F)
        slack = z @ M + Q[todo]
        tolerance = RELATIVE_TOLERANCE * np.maximum(size[todo], np.abs(z).max(1))[:, None]
        wrong = np.where(F, z < -tolerance, slack < -tolerance)
        count = wrong.sum(1)
        open_ = count > 0
        if not open_.any():
            break
        todo, wrong, count = todo[open_], wrong[open_], count[open_]
        better = count < fewest[todo]
        fewest[todo] = np.minimum(count, fewest[todo])
        patience[todo] = np.where(better, 3, patience[todo] - 1)
        stuck = patience[todo] < 0
        last = wrong.shape[1] - 1 - wrong[:, ::-1].argmax(1)
        single = np.arange(wrong.shape[1]) == last[:, None]
        free[todo] ^= np.where(stuck[:, None], single, wrong)
    return np.maximum(Z, 0.0)


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

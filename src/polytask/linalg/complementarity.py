"""Quadratic programs over the non-negative orthant, many with one matrix at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix, Vector
from polytask.linalg.shared_matrix import pull_of, refine, settle

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

RELATIVE_TOLERANCE = 1e-12
FEW = 20  # coordinates up to which an elimination costs less than a good first guess
MANY = 60  # rows from which products with all of them at once cost less than eliminations,
SMALL = 28  # unless so few coordinates are free,
FIRM = 0.6  # or so low a pull says that it would take many products
COMMON = 0.6  # share of rows in which a coordinate is free from which it is exchanged for all at first
INDEPENDENT = 1e-3  # what such a coordinate adds to those that are free more often
FIRST_LOOKS, LOOKS = 3, 12
FIRST_PULL = 0.3  # with which few free coordinates show soon
SPARSE = 0.25  # share of free coordinates up to which pivots cost less than looks
TURNS, WEAKER = 6, 4.0  # how often rows that resist settle again, and how many times the pull is lowered for that
SETTLED_ROUNDS = 2
PIVOT_ROUNDS = 60
FOLLOWED = 8  # rows that resist which are not worth a settlement
PATIENCE = 2  # exchanges of many coordinates without progress
STACKED = 8  # systems solved in one call: arrays that stay in the cache, and small enough to be allocated again without page faults
MOST_TURNS = 5  # for each coordinate
LOOSE = 1e-10
GOLDEN = (5**0.5 - 1) / 2
TINY = float(np.finfo(np.float64).tiny)


def nonnegative_qp(M: Matrix, Q: Matrix, free: Mask | None = None) -> Matrix:
    r"""Minimise :math:`\tfrac12 z^\top M z + q^\top z` over :math:`z \ge 0` for every row q of Q.

    Block principal pivoting: guess which coordinates are free, solve for them, and exchange every coordinate of the wrong sign.
    Many rows with many coordinates are guessed together by :func:`settle`. A row that resists is followed along a path one coordinate
    at a time, and goes through Lawson and Hanson's method where rounding misleads that.

    Args:
        M: positive definite with entries of order 1, shape (n, n).
        Q: one linear term a row, shape (problems, n).
        free: a first guess of the coordinates that end positive, shape (problems, n).

    Returns:
        Z, shape (problems, n): :math:`z \ge 0`, :math:`Mz + q \ge 0`, complementary, up to rounding, or for 60 and more rows up to
        a 1e-9 of the row's largest number. Cost: usually 1 to 4 linear solves a row; for many rows some dozen products with M.

    Source: Júdice and Pires, Computers & Operations Research 21 (1994); Lawson and Hanson, Solving Least Squares
    Problems (1974).
    """
    if free is not None or len(Q) == 1 or Q.shape[1] <= FEW or (Q < 0).sum(1).max() <= FEW:
        Z, free, rows = _pivot(M, Q, Q < 0 if free is None else free.copy(), PIVOT_ROUNDS)
    else:
        Z, free, rows = np.empty_like(Q), np.empty(Q.shape, dtype=bool), np.arange(len(Q))
    if len(rows) > FOLLOWED:
        Z[rows], free[rows], resisting = _together(M, Q[rows])
        rows = rows[resisting]
    for row in rows:
        Z[row] = _follow(M, Q[row], free[row])
    return np.maximum(Z, 0.0)


def _together(M: Matrix, Q: Matrix) -> tuple[Matrix, Mask, Places]:
    """Guess by the modulus method, then pivot; rows that resist are ill-conditioned ones: more of both, with less pull."""
    pull = pull_of(M)
    V, settled = settle(M, Q, max(pull, FIRST_PULL), FIRST_LOOKS)
    sparse = (V > 0).mean() <= SPARSE
    if not settled and not sparse:
        V, _ = settle(M, Q, pull, LOOKS, V)
    Z, free, rows = np.zeros_like(Q), V > 0, np.arange(len(Q))
    if settled and len(Q) >= MANY and pull >= FIRM and free.sum(1).max() > SMALL:
        Z, free, open_ = refine(M, Q, V * np.abs(Q).max(1, keepdims=True), free)
        rows, V = rows[open_], V[open_]
        if not len(rows):
            return Z, free, rows
    share = free.mean(0)
    often = np.argsort(-share)[: int((share > COMMON).sum())]
    common = np.zeros(len(M), dtype=bool)
    common[often] = np.linalg.cholesky(M[often[:, None], often]).diagonal() ** 2 > INDEPENDENT
    T, R = _exchanged(M, Q, common)
    for turn in range(TURNS):
        if turn:
            pull /= WEAKER
            V, _ = settle(M, Q[rows], pull, LOOKS, V)
            free[rows] = V > 0
        v, exchanged, resisting = _pivot(T, R[rows], free[rows] ^ common, PIVOT_ROUNDS if sparse else SETTLED_ROUNDS)
        free[rows] = exchanged ^ common
        Z[rows] = np.where(common, v @ T.T + R[rows], v) * free[rows]
        rows, V = rows[resisting], V[resisting]
        if not len(rows):
            break
    return Z, free, rows


def _exchanged(M: Matrix, Q: Matrix, B: Mask) -> tuple[Matrix, Matrix]:
    """T and r of u = Tv + r, where u is z on B and the slack elsewhere, and v the other way round.

    Rows that are free on about B have few free coordinates in v.
    """
    b, o = np.flatnonzero(B), np.flatnonzero(~B)
    k, across = len(b), M[o[:, None], b]
    solved = np.linalg.solve(M[b[:, None], b], np.concatenate([np.eye(k), across.T, Q[:, b].T], 1))
    inverse, N, q = solved[:, :k], solved[:, k : len(M)], solved[:, len(M) :]
    T, R = np.empty_like(M), np.empty_like(Q)
    T[b[:, None], b], T[b[:, None], o], T[o[:, None], b] = inverse, -N, N.T
    T[o[:, None], o] = M[o[:, None], o] - across @ N
    R[:, b], R[:, o] = -q.T, Q[:, o] - (across @ q).T
    return T, R


def _pivot(M: Matrix, Q: Matrix, free: Mask, rounds: int) -> tuple[Matrix, Mask, Places]:
    """Exchange all coordinates of the wrong sign, until that has not made them fewer for a while.

    Also the free sets, and the rows that resist.
    """
    Z, todo, resisting = np.zeros_like(Q), np.arange(len(Q)), []
    size = np.abs(Q).max(1)
    fewest, patience = np.full(len(Q), Q.shape[1] + 1), np.full(len(Q), PATIENCE)
    for _ in range(rounds):
        F = free[todo]
        Z[todo] = z = _solve_free(M, Q[todo], F)
        slack = z @ M.T + Q[todo]
        tolerance = RELATIVE_TOLERANCE * np.maximum(size[todo], np.abs(z).max(1))[:, None]
        wrong = np.where(F, z < -tolerance, slack < -tolerance)
        count = wrong.sum(1)
        fewer = count < fewest[todo]
        fewest[todo] = np.minimum(fewest[todo], count)
        patience[todo] = np.where(fewer, PATIENCE, patience[todo] - 1)
        tired = (count > 0) & (patience[todo] < 0)
        resisting.extend(todo[tired])
        still = (count > 0) & ~tired
        todo, wrong = todo[still], wrong[still]
        if not len(todo):
            break
        free[todo] ^= wrong
    return Z, free, np.asarray([*resisting, *todo], dtype=np.intp)


def _follow(M: Matrix, q: Vector, free: Mask) -> Vector:
    """One row: from a q for which a guess of the free set is right along a line to the given one, a coordinate at a time."""
    n = len(q)
    F, N = np.flatnonzero(free), np.flatnonzero(~free)
    order = np.concatenate([F, N])
    k = len(F)
    # u = T [v, q, h]: u holds z on the free set and the slack elsewhere, v the others
    T = np.empty((n, n + 2))
    right = np.column_stack([np.eye(k), -M[np.ix_(F, N)], -q[F]])
    T[:k, :-1] = np.linalg.solve(M[np.ix_(F, F)], right)
    across = M[np.ix_(N, F)]
    T[k:, :k] = across @ T[:k, :k]
    T[k:, k:-2] = M[np.ix_(N, N)] + across @ T[:k, k:-2]
    T[k:, -2] = q[N] + across @ T[:k, -2]
    T[:, -1] = np.abs(T[:, -2]).max() * (1 + np.arange(n) * GOLDEN % 1)  # all different: no two coordinates at once
    u, h, change, inside = T[:, -2], T[:, -1], np.empty_like(T), np.arange(n) < k
    for _ in range(MOST_TURNS * n):
        blocking = np.where(h > 0, -u, -np.inf) / np.maximum(h, TINY)
        i = int(blocking.argmax())
        if blocking[i] <= 0 or not T[i, i] > 0:
            break
        along, down = T[i] / -T[i, i], T[:, i].copy()
        along[i] = 1 / T[i, i]
        T[:, i] = 0.0
        T += np.multiply(down[:, None], along, out=change)
        T[i] = along
        inside[i] = not inside[i]
    final = np.zeros(n, dtype=bool)
    final[order[inside]] = True
    z = _solve_free(M, q[None], final[None])[0]
    tolerance = LOOSE * max(float(np.abs(q).max()), float(np.abs(z).max()))
    return z if np.where(final, z, M @ z + q).min() >= -tolerance else _lawson_hanson(M, q)


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
    if len(Q) == 1:
        at = np.flatnonzero(F[0])
        Z[0, at] = np.linalg.solve(M[at[:, None], at], -Q[0, at])
        return Z
    if Q.shape[1] <= FEW:  # all of one size, padded with the identity
        padded = np.where(F[:, :, None] & F[:, None, :], M, np.eye(Q.shape[1]))
        return np.asarray(np.linalg.solve(padded, np.where(F, -Q, 0.0)[:, :, None])[:, :, 0])
    # stacks of systems of about one size, the smaller ones padded with the identity
    n, counts = len(M), F.sum(1)
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    for rows in np.array_split(order, -(-len(order) // STACKED)) if len(order) else ():
        width = counts[rows[-1]]
        index = np.argsort(~F[rows], axis=1, kind="stable")[:, :width]
        A, b = M.take(n * index[:, :, None] + index[:, None, :]), -np.take_along_axis(Q[rows], index, 1)
        system, at = np.nonzero(np.arange(width) >= counts[rows][:, None])
        A[system, at], A[system, :, at], A[system, at, at], b[system, at] = 0.0, 0.0, 1.0, 0.0
        Z[rows[:, None], index] = np.linalg.solve(A, b[:, :, None])[:, :, 0]
    return Z

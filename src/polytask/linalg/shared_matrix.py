"""Many non-negative quadratic programs with one matrix, by matrix products alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix

Mask = npt.NDArray[np.bool_]
Single = npt.NDArray[np.float32]

ACCURACY = 1e-9  # of residuals, relative to the largest number of the row
ROUGH, FINE = 0.3, 1e-3  # how far a residual is lowered while free sets still change, and afterwards
SWEEPS = 10
PATIENCE = 4  # sweeps after which half of the free sets should have stopped changing
MOST_STEPS = 25
GUESS_STEPS = 30
TINY = float(np.finfo(np.float32).tiny)


def solve_together(M: Matrix, Q: Matrix) -> tuple[Matrix, Mask]:
    r"""Minimise :math:`\tfrac12 z^\top M z + q^\top z` over :math:`z \ge 0` for every row q of Q at once.

    A product of all rows with the common matrix costs less than one small factorisation a row. In turns, conjugate gradients lower
    the residuals on the free coordinates; those that turn negative leave the free set; those whose slack is negative enter it.
    Products run in single precision; residuals and signs are taken in double precision, which refines the result.

    Args:
        M: positive definite with entries of order 1, shape (n, n).
        Q: one linear term a row, shape (problems, n).

    Returns:
        Z, shape (problems, n), with residuals below a 1e-9 of the row's largest number; and which rows are not that far: ill-conditioned
        ones, or such whose free sets do not settle.
        Cost: usually 15 to 80 products of all rows with M.
    """
    M32, Z, F = M.astype(np.float32), np.zeros_like(Q), Q < 0
    rows, z, slack, settled = np.arange(len(Q)), Z, Q, 0.0
    open_ = np.ones(len(Q), dtype=bool)
    for sweep in range(SWEEPS):
        free, q = F[rows], Q[rows]
        residual = slack * free
        size = np.maximum(np.abs(residual).max(1, keepdims=True), TINY)
        step = _conjugate_gradients(M32, (residual / -size).astype(np.float32), free, FINE if settled > 0.7 else ROUGH)
        z = z + size * step
        leaving = z < 0
        z[leaving] = 0.0
        free &= ~leaving
        slack = z @ M + q
        bound = ACCURACY * np.maximum(np.abs(q).max(1), z.max(1))
        entering = ~free & (slack < -bound[:, None])
        changed = (entering | leaving).any(1)
        done = (np.abs(slack * free).max(1) <= bound) & ~entering.any(1)
        Z[rows], F[rows], open_[rows] = z, free | entering, ~done
        settled = 1 - float(changed.mean())
        rows, z, slack = rows[~done], z[~done], slack[~done]
        if not len(rows) or (sweep + 1 >= PATIENCE and settled < 0.5):
            break
    return Z, open_


def look_free(M: Matrix, Q: Matrix) -> Mask:
    """The coordinates that are positive after some accelerated projected gradient steps; Beck and Teboulle (2009)."""
    step = 1 / float(np.abs(M).sum(1).max())
    M32, Q32 = (step * M).astype(np.float32), (step * Q).astype(np.float32)
    Z = np.maximum(-Q32, 0.0)
    ahead, momentum = Z, 1.0
    for _ in range(GUESS_STEPS):
        before, Z = Z, np.maximum(ahead - ahead @ M32 - Q32, 0.0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = Z + np.float32((momentum - 1) / following) * (Z - before)
        momentum = following
    return np.asarray(Z > 0)


def _conjugate_gradients(M: Single, B: Single, free: Mask, reduction: float) -> Single:
    """About the d with (M d)_F = b_F and 0 elsewhere for every row b of B, itself 0 there; Hestenes and Stiefel (1952)."""
    mask = free.astype(np.float32)
    D, R, P = np.zeros_like(B), B.copy(), B.copy()
    square = np.einsum("ij,ij->i", R, R)
    wanted = reduction**2 * square
    for _ in range(MOST_STEPS):
        MP = P @ M
        MP *= mask
        curvature = np.einsum("ij,ij->i", P, MP)
        length = np.where(curvature > 0, square / np.maximum(curvature, TINY), 0.0)[:, None]
        D += length * P
        MP *= length
        R -= MP
        before, square = square, np.einsum("ij,ij->i", R, R)
        if (square <= wanted).all():
            break
        P *= (square / np.maximum(before, TINY))[:, None]
        P += R
    return D

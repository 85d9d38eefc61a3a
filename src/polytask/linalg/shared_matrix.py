"""Many non-negative quadratic programs with one matrix, by matrix products alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix

Mask = npt.NDArray[np.bool_]
Single = npt.NDArray[np.float32]

ACCURACY = 1e-9  # of residuals, relative to the largest number of the row
ROUGH, FINE = 0.3, 1e-4  # how far conjugate gradients lower residuals while free sets still change, and afterwards
NEGATIVE = 1e-5  # slack, relative to the row's largest number, that single precision tells from 0
SETTLED = 0.4  # share of rows whose free sets may still change when finer methods take over
ROUGH_SWEEPS, FINE_SWEEPS = 5, 3
MOST_STEPS = 25
PULL, OVERSHOOT = 0.2, 1.7  # penalty and relaxation of the alternating directions
LOOKS, BETWEEN_LOOKS = 6, 8  # how often it is seen whether they still change free sets
TINY = float(np.finfo(np.float32).tiny)


def settle(M: Matrix, Q: Matrix) -> tuple[Matrix, Mask]:
    r"""About the z of :func:`nonnegative_qp` for every row q of Q at once, and which of its coordinates are positive.

    A product of all rows with one matrix costs less than one small factorisation a row. In turns, conjugate gradients lower the residuals
    on the free coordinates; those that turn negative leave the free set; those whose slack is negative enter it. Where that goes on
    and on, as it does for nearly dependent vectors that oppose one another, :func:`_alternate` takes over.

    Args:
        M: positive definite with entries of order 1, shape (n, n).
        Q: one linear term a row, shape (problems, n).

    Returns:
        Z, non-negative, and the free sets, shape (problems, n). Cost: usually 10 to 60 products of all rows with a matrix, in single
        precision.
    """
    size = np.maximum(np.abs(Q).max(1, keepdims=True), TINY)
    M32, Q32 = M.astype(np.float32), (Q / size).astype(np.float32)
    Z, slack, free = np.zeros_like(Q32), Q32, Q32 < 0
    for _ in range(ROUGH_SWEEPS):
        Z += _conjugate_gradients(M32, slack * free, free, ROUGH)
        leaving = Z < 0
        np.maximum(Z, 0.0, out=Z)
        free &= ~leaving
        slack = Z @ M32
        slack += Q32
        entering = slack < -NEGATIVE
        entering &= ~free
        free |= entering
        leaving |= entering
        if leaving.any(1).mean() < SETTLED:
            break
    else:
        Z = _alternate(M, Q / size)
        free = Z > 0
    return Z * size, free


def _alternate(M: Matrix, Q: Matrix) -> Single:
    r"""The alternating direction method of multipliers; Boyd et al., Foundations and Trends in Machine Learning 3 (2011).

    :math:`x = -(M + \rho I)^{-1}(q - \rho(z - u))`, relaxed, :math:`z = (x + u)_+`, :math:`u \leftarrow u + x - z`: one inverse serves all
    rows and steps, and few steps find most of the free sets however ill-conditioned M is.
    """
    inverse = np.linalg.inv(M + PULL * np.eye(len(M)))
    fixed, N = (Q @ (-OVERSHOOT * inverse)).astype(np.float32), (OVERSHOOT * PULL * inverse).astype(np.float32)
    Z, U = np.maximum(fixed, 0.0), np.minimum(fixed, 0.0)
    for _ in range(LOOKS):
        before = Z > 0
        for _ in range(BETWEEN_LOOKS):
            X = (Z - U) @ N
            X += fixed
            Z *= np.float32(1 - OVERSHOOT)
            X += Z
            U += X
            Z = np.maximum(U, 0.0)
            np.minimum(U, 0.0, out=U)
        if (before != (Z > 0)).any(1).mean() < SETTLED:
            break
    return np.asarray(Z)


def refine(M: Matrix, Q: Matrix, Z: Matrix, free: Mask) -> tuple[Matrix, Mask, Mask]:
    """From what :func:`settle` returns to what can be trusted: products in single precision, residuals and signs in double.

    Returns:
        Z, with residuals below a 1e-9 of the row's largest number; the free sets; and which rows are not that far: ill-conditioned ones,
        or such whose free sets do not settle. Cost: usually 20 to 40 products of all rows with M.
    """
    M32, free = M.astype(np.float32), free.copy()
    Z = np.where(free, Z, 0.0)
    rows, z, slack = np.arange(len(Q)), Z, Z @ M + Q
    open_ = np.ones(len(Q), dtype=bool)
    for _ in range(FINE_SWEEPS):
        F, q = free[rows], Q[rows]
        residual = slack * F
        size = np.maximum(np.abs(residual).max(1, keepdims=True), TINY)
        z = z + size * _conjugate_gradients(M32, (residual / size).astype(np.float32), F, FINE)
        leaving = z < 0
        z[leaving] = 0.0
        F &= ~leaving
        slack = z @ M + q
        bound = ACCURACY * np.maximum(np.abs(q).max(1), z.max(1))
        entering = ~F & (slack < -bound[:, None])
        done = (np.abs(slack * F).max(1) <= bound) & ~entering.any(1)
        Z[rows], free[rows], open_[rows] = z, F | entering, ~done
        rows, z, slack = rows[~done], z[~done], slack[~done]
        if not len(rows):
            break
    return Z, free, open_


def _conjugate_gradients(M: Single, B: Single, free: Mask, reduction: float) -> Single:
    """About the d with (M d)_F = -b_F and 0 elsewhere for every row b of B, itself 0 there; Hestenes and Stiefel (1952)."""
    mask = free.astype(np.float32)
    D, R, P = np.zeros_like(B), -B, -B
    square = np.einsum("ij,ij->i", R, R)
    wanted = reduction**2 * square
    for _ in range(MOST_STEPS):
        MP = P @ M
        MP *= mask
        curvature = np.einsum("ij,ij->i", P, MP)
        length = np.divide(square, curvature, out=np.zeros_like(square), where=curvature > square * TINY)[:, None]
        D += length * P
        MP *= length
        R -= MP
        before, square = square, np.einsum("ij,ij->i", R, R)
        if (square <= wanted).all():
            break
        P *= (square / np.maximum(before, TINY))[:, None]
        P += R
    return D

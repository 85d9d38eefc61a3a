"""Many non-negative quadratic programs with one matrix, by matrix products alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix

Mask = npt.NDArray[np.bool_]
Single = npt.NDArray[np.float32]

ACCURACY = 1e-9  # of residuals, relative to the largest number of the row
FINE = 1e-4  # how far conjugate gradients lower residuals
SWEEPS = 3
MOST_STEPS = 25
LEAST_PULL = 0.05
BETWEEN_LOOKS = 8  # steps until it is seen again whether free sets still change
SETTLED = 0.1  # share of rows in which they may
TINY = float(np.finfo(np.float32).tiny)


def pull_of(M: Matrix) -> float:
    r"""The pull with which :func:`settle` is fastest for random vectors: :math:`\sqrt{\lambda_{\min} \lambda_{\max}}` of free coordinates.

    Those of a half of n vectors in P dimensions have :math:`\lambda = (1 \pm \sqrt{n / 2P})^2`, and the eigenvalues of all have the
    variance n / P.
    """
    return max(1 - (float(np.square(M).sum()) / len(M) - 1) / 2, LEAST_PULL)


def settle(M: Matrix, Q: Matrix, pull: float, looks: int, V: Single | None = None) -> tuple[Single, bool]:
    r"""About the z of :func:`nonnegative_qp` for every row q of Q at once, by the modulus method.

    With :math:`z = v_+` and the slack :math:`-\rho v_-`, complementary whatever v is, :math:`Mz + q` is the slack where

    .. math:: v = (\rho I + M)^{-1} ((\rho I - M) |v| - 2q)

    which is iterated: the matrix on :math:`|v|` is a contraction. It serves all rows and steps, and a product of all rows with it costs
    less than one small factorisation a row.

    Args:
        M: positive definite with entries of order 1, shape (n, n).
        Q: one linear term a row, shape (problems, n).
        pull: :math:`\rho`.
        looks: how often at most it is seen whether free sets still change.
        V: where to go on from.

    Returns:
        z less the slack, over the row's largest number, shape (problems, n), and whether free sets have settled. Cost: 8 products of all
        rows with a matrix a look, in single precision.

    Source: van Bokhoven, Piecewise-Linear Modelling and Analysis (1981); it is Peaceman and Rachford's alternation of directions.
    """
    twice = 2 * np.linalg.inv(M + pull * np.eye(len(M)))
    size = np.maximum(np.abs(Q).max(1, keepdims=True), TINY)
    fixed, N = (Q / size @ -twice).astype(np.float32), (pull * twice - np.eye(len(M))).astype(np.float32)
    v = fixed if V is None else np.where(V < 0, V / np.float32(pull), V)
    settled = False
    for _ in range(looks):
        before = v > 0
        for _ in range(BETWEEN_LOOKS):
            v = np.abs(v) @ N
            v += fixed
        settled = bool((before != (v > 0)).any(1).mean() < SETTLED)
        if settled:
            break
    return np.where(v < 0, np.float32(pull) * v, v), settled


def refine(M: Matrix, Q: Matrix, Z: Matrix, free: Mask) -> tuple[Matrix, Mask, Mask]:
    """From about z, and its free sets, to what can be trusted: products in single precision, residuals and signs in double.

    Returns:
        Z, with residuals below a 1e-9 of the row's largest number; the free sets; and which rows are not that far: ill-conditioned ones,
        or such whose free sets do not settle. Cost: usually 20 to 40 products of all rows with M.
    """
    M32, free = M.astype(np.float32), free.copy()
    Z = np.where(free, Z, 0.0)
    rows, z, slack = np.arange(len(Q)), Z, Z @ M + Q
    open_ = np.ones(len(Q), dtype=bool)
    for _ in range(SWEEPS):
        F, q = free[rows], Q[rows]
        residual = slack * F
        size = np.maximum(np.abs(residual).max(1, keepdims=True), TINY)
        z = z + size * _conjugate_gradients(M32, (residual / size).astype(np.float32), F)
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


def _conjugate_gradients(M: Single, B: Single, free: Mask) -> Single:
    """About the d with (M d)_F = -b_F and 0 elsewhere for every row b of B, itself 0 there; Hestenes and Stiefel (1952)."""
    mask = free.astype(np.float32)
    D, R, P = np.zeros_like(B), -B, -B
    square = np.einsum("ij,ij->i", R, R)
    wanted = FINE**2 * square
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

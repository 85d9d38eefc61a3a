"""Singular triplets and polar factors by the eigendecomposition of the smaller Gramian.

A Gramian in float64 resolves singular values down to about 1e-8 of the largest: for float32 weights that is all they hold. An
eigendecomposition of the small side costs a fraction of an SVD, and memory for small-side squares only. Leading triplets of float32
matrices are found in float32, at half the price, and mended in float64; how far they still are from the exact ones is known from what
is left over, and where that is too much, all is done in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are noise of float32 arithmetic: their vectors are left out."""

ROWS = 256
SMALL = 256
"""Sides up to which float64 costs next to nothing."""

MORE = 8
"""Pairs found beyond those wanted: across so many the eigenvalues have fallen, however close two of them are at the cut."""

LEAK = 2e-5
"""The part of the leading space, root mean square over its vectors, that may lie outside of the one found."""


def product(A: Float[Tensor, "m k"], B: Float[Tensor, "n k"]) -> Float[Tensor, "m n"]:
    r""":math:`A B^\top`."""
    # oneDNN multiplies with the widest instructions of any maker's processor, MKL only of its own maker's: half the time where they differ
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if onednn and A.dtype == B.dtype == torch.float32 and A.numel() and B.numel():
        found: Tensor = torch.nn.functional.linear(A.to_mkldnn(), B.to_mkldnn()).to_dense()
        return found
    return A @ B.T


def small_gramian(A: Float[Tensor, "m n"]) -> Float[Tensor, "k k"]:
    r""":math:`A A^\top` or :math:`A^\top A`, whichever is smaller, float64; summed in pieces, so that A is never copied whole."""
    half = _lower_gramian(A, torch.float64)
    return half.tril() + half.tril(-1).T


def _lower_gramian(A: Float[Tensor, "m n"], dtype: torch.dtype) -> Float[Tensor, "k k"]:
    # the lower triangle alone, column after column as LAPACK has it: half the multiplications of a plain product
    from scipy.linalg import blas  # a fifth of a second that plans need not wait for

    tall = A.shape[0] >= A.shape[1]
    k, add = min(A.shape), blas.dsyrk if dtype == torch.float64 else blas.ssyrk
    G = np.zeros((k, k), order="F", dtype=np.float64 if dtype == torch.float64 else np.float32)
    for start in range(0, max(A.shape) if k else 0, ROWS):
        piece = A[start : start + ROWS] if tall else A[:, start : start + ROWS]
        G = add(1.0, piece.to(dtype).contiguous().numpy().T, 1.0, G, trans=not tall, lower=True, overwrite_c=True)
    return torch.from_numpy(G)


def leading_pairs(G: Float[Tensor, "n n"], k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """The k largest eigenvalues of a symmetric matrix, descending, and their vectors; only its lower triangle is read."""
    from scipy.linalg import eigh

    n = len(G)
    if not 0 < 2 * k <= n:
        values, vectors = all_pairs(G)
        return values.flip(0)[:k], vectors.flip(1)[:, :k]
    # PyTorch computes all vectors or none; a part of them takes half the time
    chosen, found = eigh(G.numpy(), subset_by_index=[n - k, n - 1], driver="evr", check_finite=False)
    return torch.from_numpy(chosen[::-1].copy()), torch.from_numpy(found[:, ::-1].copy())


def all_pairs(G: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """All eigenvalues of a symmetric matrix, ascending, and their vectors; only its lower triangle is read."""
    from scipy.linalg import eigh

    if not len(G):
        return G.diagonal(), G
    values, vectors = eigh(G.numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def leading_triplets(
    A: Float[Tensor, "m n"], k: int, dtype: torch.dtype | None = None, *, exact: bool = False
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """The k leading singular triplets (U, s, Vh) of A, fewer where its rank is lower; in A's dtype, or another.

    Args:
        A: the matrix.
        k: how many.
        dtype: of what is returned.
        exact: in float64 from the start.

    Cost: m n min(m, n) / 2 multiplications and an eigendecomposition of the smaller side.
    """
    tall = A if A.shape[0] >= A.shape[1] else A.T
    found = None if exact or not can_be_mended(A, k) else _mended(tall, k)
    s, small, long = found or _exact(tall, k)
    left, right = (long, small) if tall is A else (small, long)
    dtype = dtype or A.dtype
    return left.to(dtype), s.to(dtype), right.T.to(dtype)


def can_be_mended(A: Float[Tensor, "m n"], k: int) -> bool:
    """Whether k leading triplets are worth finding in float32 first."""
    return A.dtype == torch.float32 and min(A.shape) > SMALL and 0 < 2 * (k + MORE) <= min(A.shape)


def in_doubt(s: Float[Tensor, " k"]) -> bool:
    """Whether spaces side by side share directions, by the stack's singular values: only float64 tells signal from noise there."""
    return int((s < 100 * LEAK * s.max()).sum()) > len(s) // 64 if len(s) else False


def _exact(A: Float[Tensor, "m n"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    squares, V = leading_pairs(_lower_gramian(A, torch.float64), k)
    s, r = kept(squares)
    V = V[:, :r]
    return s, V, A.double() @ (V / s)


def kept(squares: Float[Tensor, " k"]) -> tuple[Float[Tensor, " r"], int]:
    """The roots of eigenvalues, descending, as far as they are more than noise."""
    s = squares.clamp_min(0).sqrt()
    r = int((s > NEGLIGIBLE * s[0]).sum()) if len(s) else 0
    return s[:r], r


def _mended(A: Float[Tensor, "m n"], k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    r"""The leading triplets from the float32 Gramian, by one step of Rayleigh and Ritz in float64; None where that is not enough.

    With :math:`A^\top A V = V \Theta + R`, the leading space leaves V by an angle of about :math:`\|R_i\| / (\theta_i - \theta_{k+b})`
    (Davis and Kahan). Where the rank is lower than k, a space of noise is told from one of signal in float64 only.
    """
    G = _lower_gramian(A, torch.float32)
    if not torch.isfinite(G.diagonal().sum()):
        return None
    V = orthonormal(leading_pairs(G, k + MORE)[1].double())
    Y = A.double() @ V
    theta, W = rayleigh_ritz(Y, Y)
    s, r = kept(theta[:k])
    if r < k:
        return None
    V, Y = V @ W[:, :k], (Y @ W[:, :k]) / s
    R = A.T @ Y.float() - (V * s).float()
    leak = R.double().norm(dim=0) * s / (theta[:k] - theta[-1])
    return (s, V, Y) if leak.square().mean() <= LEAK**2 else None


def rayleigh_ritz(
    U: Float[Tensor, "m r"], MU: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r r"]]:
    """Eigenvalues, descending, and vectors of a symmetric M within the space of U's columns."""
    theta, W = all_pairs(U.T @ MU)
    return theta.flip(0), W.flip(1)


def orthonormal(U: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """Nearly orthonormal columns made orthonormal to the last digit; each keeps its direction, as the order of QR does."""
    L, failed = torch.linalg.cholesky_ex(U.T @ U)
    Q: Tensor = torch.linalg.qr(U)[0] if failed else torch.linalg.solve_triangular(L, U.T, upper=False).T
    return Q


def polar_factors(
    A: Float[Tensor, "m n"], dtype: torch.dtype | None = None, *, exact: bool = False
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    r"""Two matrices whose product is the polar factor of A, and between them the singular values, ascending, k = min(m, n).

    They are U and :math:`V^\top` of :math:`A = U S V^\top`. Of a float32 matrix twice as long as wide or more they are A itself and
    :math:`(A^\top A)^{-1/2}`, in float32, where that is close enough: direction i is off by about :math:`\epsilon (s_1 / s_i)^2`.
    """
    tall, dtype = A if A.shape[0] >= A.shape[1] else A.T, dtype or A.dtype
    far_longer = A.dtype == dtype == torch.float32 and len(tall) >= 2 * tall.shape[1] > 2 * SMALL
    found = _whitening(tall) if far_longer and not exact else None
    if found:
        long, (s, small) = tall, found
    else:
        squares, V = all_pairs(_lower_gramian(A, torch.float64))
        s = squares.clamp_min(0).sqrt()
        inverse = torch.where(s > NEGLIGIBLE * s[-1], 1 / s, 0.0) if len(s) else s
        # what is small must come out of this product exactly; from there on columns have length one
        long, small = ((tall @ V.to(A.dtype)) * inverse).to(dtype), V.T.to(dtype)
    return (long, s.to(dtype), small) if tall is A else (small.T, s.to(dtype), long.T)


def _whitening(A: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]] | None:
    r"""The singular values and :math:`(A^\top A)^{-1/2}`, in float32; None where that is not close enough."""
    G, single = _lower_gramian(A, torch.float32), torch.finfo(torch.float32)
    if not torch.isfinite(G.diagonal().sum()):
        return None
    squares, V = all_pairs(G)
    off = single.eps * squares[-1] / squares
    if squares[0] * single.eps < single.tiny or off.square().mean() > LEAK**2:
        return None
    s = squares.sqrt()
    return s, V / s @ V.T


def polar(
    A: Float[Tensor, "m n"], dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "m n"], Float[Tensor, " k"]]:
    r"""The polar factor :math:`U V^\top` of :math:`A = U S V^\top`, and the singular values, ascending, k = min(m, n).

    Where A lacks rank, directions outside its row and column space map to zero: unlike the completion an SVD happens to return, that
    does not depend on rounding. Both come in A's dtype, or another.
    """
    left, s, right = polar_factors(A, dtype, exact=True)
    return left @ right, s

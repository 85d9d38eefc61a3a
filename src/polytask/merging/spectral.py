"""Singular triplets and polar factors by the eigendecomposition of the smaller Gramian.

A Gramian in float64 resolves singular values down to about 1e-8 of the largest: for float32 weights that is all they hold. An
eigendecomposition of the small side costs a fraction of an SVD, and memory for small-side squares only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are noise of float32 arithmetic: their vectors are left out."""

ROWS = 256


def small_gramian(A: Float[Tensor, "m n"]) -> Float[Tensor, "k k"]:
    r""":math:`A A^\top` or :math:`A^\top A`, whichever is smaller, float64; summed in pieces, so that A is never copied whole."""
    tall = A if A.shape[0] >= A.shape[1] else A.T
    G = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, len(tall), ROWS):
        exact = tall[start : start + ROWS].double()
        G.addmm_(exact.T, exact)
    return G


def leading_pairs(G: Float[Tensor, "n n"], k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """The k largest eigenvalues of a symmetric matrix, descending, and their vectors."""
    n = len(G)
    if not 0 < 2 * k <= n:
        values, vectors = torch.linalg.eigh(G)
        return values.flip(0)[:k], vectors.flip(1)[:, :k]
    # PyTorch computes all vectors or none; a part of them takes half the time
    from scipy.linalg import eigh  # a fifth of a second that plans need not wait for

    chosen, found = eigh(G.numpy(), subset_by_index=[n - k, n - 1], driver="evr", check_finite=False)
    return torch.from_numpy(chosen[::-1].copy()), torch.from_numpy(found[:, ::-1].copy())


def leading_triplets(
    A: Float[Tensor, "m n"], k: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """The k leading singular triplets (U, s, Vh) of A, fewer where its rank is lower; in A's dtype.

    Cost: m n min(m, n) multiplications and an eigendecomposition of the smaller side.
    """
    squares, vectors = leading_pairs(small_gramian(A), k)
    s = squares.clamp_min(0).sqrt()
    r = int((s > NEGLIGIBLE * s[0]).sum()) if len(s) else 0
    s, small = s[:r], vectors[:, :r]
    if A.shape[0] >= A.shape[1]:
        return A @ (small / s).to(A.dtype), s.to(A.dtype), small.T.to(A.dtype)
    return small.to(A.dtype), s.to(A.dtype), (small / s).T.to(A.dtype) @ A


def polar(A: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m n"], Float[Tensor, " k"]]:
    r"""The polar factor :math:`U V^\top` of :math:`A = U S V^\top`, and the singular values, ascending, k = min(m, n).

    Where A lacks rank, directions outside its row and column space map to zero: unlike the completion an SVD happens to return, that
    does not depend on rounding.
    """
    squares, vectors = torch.linalg.eigh(small_gramian(A))
    s = squares.clamp_min(0).sqrt()
    inverse = torch.where(s > NEGLIGIBLE * s[-1], 1 / s, 0.0) if len(s) else s
    root = ((vectors * inverse) @ vectors.T).to(A.dtype)
    return (A @ root if A.shape[0] >= A.shape[1] else root @ A), s.to(A.dtype)

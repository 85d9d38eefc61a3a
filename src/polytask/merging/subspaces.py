"""Orthonormal bases: of what a matrix reads, of what several of them span; and taking such a space out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.merging.spectral import leading_triplets

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

OVERSAMPLING = 8

EMPTY = 1e-6
"""A residual of unit vectors whose Frobenius norm is below this spans nothing."""

TOLERANCE = 1e-6
"""Singular values below this part of the largest count as no direction of their own."""


def right_basis(A: Float[Tensor, "m n"], k: int, generator: torch.Generator | None = None) -> Float[Tensor, "n r"]:
    """The k leading right singular vectors of A, float64; fewer where its rank is lower.

    Args:
        A: a matrix.
        k: how many.
        generator: of a randomised decomposition with two power iterations (Halko, Martinsson and Tropp 2011); exact when omitted.
    """
    if k <= 0 or not A.numel():
        return A.new_zeros(A.shape[1], 0, dtype=torch.float64)
    if generator is None:
        Vh = leading_triplets(A.double(), k)[2]
        # vectors of small singular values come out of the Gramian's other side: make them orthonormal to the last digit
        Q: Tensor = torch.linalg.qr(Vh.T)[0]
        return Q
    A = A.double()
    Q = A.T @ torch.randn(A.shape[0], min(k + OVERSAMPLING, *A.shape), generator=generator, dtype=torch.float64)
    for _ in range(2):
        Q = A.T @ (A @ torch.linalg.qr(Q)[0])
    Q = torch.linalg.qr(Q)[0]
    _, s, Vh = torch.linalg.svd(A @ Q, full_matrices=False)
    r = min(k, int((s > TOLERANCE * s[0]).sum()))
    leading: Tensor = Q @ Vh[:r].T
    return leading


def rank_for_energy(A: Float[Tensor, "m n"], share: float) -> int:
    """The least rank whose squared singular values add up to a share of all of them."""
    squares = torch.linalg.svdvals(A.double()).square()
    return int((squares.cumsum(0) < share * squares.sum() * (1 - 1e-12)).sum()) + 1 if squares.sum() > 0 else 0


def orthonormal(A: Float[Tensor, "n k"], tolerance: float = TOLERANCE) -> Float[Tensor, "n r"]:
    """An orthonormal basis of the columns' span; directions with a singular value below ``tolerance`` times the largest are left out."""
    if not A.shape[1] or float(A.norm()) < EMPTY:
        return A[:, :0]
    U, s, _ = torch.linalg.svd(A, full_matrices=False)
    basis: Tensor = U[:, s > tolerance * s[0]]
    return basis


def without(W: Float[Tensor, "m n"], R: Float[Tensor, "n r"]) -> Float[Tensor, "m n"]:
    r""":math:`W (I - R R^\top)`: W where it reads nothing from the space that R spans."""
    R = R.to(W.dtype)
    return W - (W @ R) @ R.T

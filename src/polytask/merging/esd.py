"""Essential subspace decomposition: the directions in which a layer's output moves on real inputs (Li et al. 2026, arXiv:2606.19164)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.merging.spectral import NEGLIGIBLE, leading_pairs, leading_triplets, polar


def esd(
    delta: Float[Tensor, "m n"], G: Float[Tensor, "n n"], k: int
) -> tuple[Float[Tensor, " r"], Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    r"""The k essential directions of an update: those that hold most of the outputs' movement :math:`Y = X \Delta^\top`.

    .. math:: Y^\top Y = \Delta G \Delta^\top = U \operatorname{diag}(s^2)\, U^\top, \qquad
        \Delta \approx U_k V_k, \quad V_k = U_k^\top \Delta

    Of all matrices of rank k, :math:`U_k V_k` minimises :math:`\|X(\Delta - D)^\top\|_F` (Eckart and Young); the error is the root of the
    squares left out of s. Where the inputs are white it is the truncated SVD. No activations are needed, only their Gramian.

    Args:
        delta: :math:`\Delta`.
        G: :math:`X^\top X`, not centred; any multiple of it gives the same directions.
        k: how many.

    Returns:
        s (descending), U (orthonormal columns) and V, float64; fewer than k where Y has lower rank, since beyond it directions are noise.

    Cost: m n^2 multiplications and an eigendecomposition of the smaller side; where m > n a Cholesky factor of G, or where that is
    singular its eigendecomposition.
    """
    exact = delta.double()
    if delta.shape[0] <= delta.shape[1]:
        squares, U = leading_pairs(exact @ G @ exact.T, k)
        s = squares.clamp_min(0).sqrt()
        r = int((s > NEGLIGIBLE * s[0]).sum()) if len(s) else 0
        s, U = s[:r], U[:, :r]
    else:
        # a root of G stands for X: a thousand rows or a million, it has n
        U, s, _ = leading_triplets(exact @ _root(G), k)
        U = _orthonormalised(U)
    return s, U, U.T @ exact


def _root(G: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    r"""L with :math:`L L^\top = G`."""
    L, failed = torch.linalg.cholesky_ex(G)
    if failed:
        values, vectors = torch.linalg.eigh(G)
        L = vectors * values.clamp_min(0).sqrt()
    root: Tensor = L
    return root


def _orthonormalised(U: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    # these vectors came through the Gramian of the other side: make them orthonormal to the last digit
    # a Cholesky factor of nearly the identity keeps every vector's direction, as the order of QR does
    L, failed = torch.linalg.cholesky_ex(U.T @ U)
    Q: Tensor = torch.linalg.qr(U)[0] if failed else torch.linalg.solve_triangular(L, U.T, upper=False).T
    return Q


def scaled_polar(A: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    r"""The polar factor of A at A's mean singular value: :math:`\bar s\, P Q^\top` where :math:`A = P \operatorname{diag}(s) Q^\top`."""
    direction, s = polar(A)
    return direction * s.mean()

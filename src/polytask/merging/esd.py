"""Essential subspace decomposition: the directions in which a layer's output moves on real inputs (Li et al. 2026, arXiv:2606.19164)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.merging.spectral import (
    LEAK,
    MORE,
    ROWS,
    can_be_mended,
    kept,
    leading_pairs,
    leading_triplets,
    orthonormal,
    product,
    rayleigh_ritz,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LARGEST = 1e30
"""Entries of Gramians that float32 can hold with room for sums of them."""

PROBES = 3
"""Random sums of residuals that tell how long they are together: the exact product with one vector is cheap, with a matrix it is not."""


def esd(
    delta: Float[Tensor, "m n"],
    G: Float[Tensor, "n n"],
    k: int,
    dtype: torch.dtype | None = None,
    *,
    exact: bool = False,
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
        dtype: of V, and of the product that makes it; float64 when omitted.
        exact: in float64 from the start.

    Returns:
        s (descending) and U (orthonormal columns), float64, and V; fewer than k where Y has lower rank: beyond it directions are noise.

    Cost: m n^2 / 2 + m^2 n multiplications, in float32 where that is close enough, and an eigendecomposition of the smaller side; where
    m > n a Cholesky factor of G, or where that is singular its eigendecomposition.
    """
    m, n = delta.shape
    dtype = dtype or torch.float64
    if m > n:
        # a root of G stands for X: a thousand rows or a million, it has n
        U, s, _ = leading_triplets(delta.double() @ _root(G), k)
        U = orthonormal(U)
    else:
        found = None if exact or not can_be_mended(delta, k) else _in_float32(delta, G, k)
        if found is None:
            squares, U = leading_pairs(_between(delta.double(), G), k)
            s, r = kept(squares)
            found = s, U[:, :r]
        s, U = found
    return s, U, U.T.to(dtype) @ delta.to(dtype)


def _between(delta: Float[Tensor, "m n"], G: Float[Tensor, "n n"]) -> Float[Tensor, "m m"]:
    r""":math:`\Delta G \Delta^\top = \Delta H \Delta^\top + (\Delta H \Delta^\top)^\top` of a symmetric :math:`G = H + H^\top`.

    In the dtype of :math:`\Delta`; half of the first product, for H is block-triangular.
    """
    M = product(_times_half(delta, G), delta)
    return M + M.T


def _times_half(delta: Float[Tensor, "m n"], G: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    r""":math:`\Delta H`, where H is G below its diagonal blocks, and half of G in them."""
    h = len(G) // 2
    if len(G) <= ROWS:
        return product(delta, G.to(delta.dtype) / 2)
    above, below = delta[:, :h], delta[:, h:]
    left = _times_half(above, G[:h, :h]) + product(below, G[:h, h:].to(delta.dtype))
    return torch.cat([left, _times_half(below, G[h:, h:])], 1)


def _in_float32(
    delta: Float[Tensor, "m n"], G: Float[Tensor, "n n"], k: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k"]] | None:
    """The k leading directions from a product in float32, None where they are not close enough to the exact product's."""
    unit = delta.norm().double() * G.diagonal().mean().sqrt()
    if not (unit > 0 and G.diagonal().max() < LARGEST):
        return None
    delta = delta / unit
    M = _between(delta, G)
    U = orthonormal(leading_pairs(M, k + MORE)[1].double())
    theta, W = rayleigh_ritz(U, (M @ U.float()).double())
    outside, U = theta[-1], U @ W[:, :k]
    s, r = kept(theta[:k])
    if r < k:
        return None
    signs = torch.randint(0, 2, (PROBES, k), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    probes = signs / (theta[:k] - outside)
    exact = delta.double()
    left = exact @ (G @ (probes @ U.T @ exact).T) - U @ (theta[:k] * probes).T
    leak = left.square().sum() / PROBES / k
    return (s * unit, U) if leak <= LEAK**2 else None


def _root(G: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    r"""L with :math:`L L^\top = G`."""
    L, failed = torch.linalg.cholesky_ex(G)
    if failed:
        values, vectors = torch.linalg.eigh(G)
        L = vectors * values.clamp_min(0).sqrt()
    root: Tensor = L
    return root

"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025, arXiv:2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import MatrixMerger, Place, TaskVectorOptions, in_range
from polytask.merging.spectral import leading_triplets, polar
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "iso_cts",
    family="merging",
    paper="arXiv:2502.04959",
    needs="base",
    aliases=("isocts",),
    invariances=("permutation", "scale", "rotation"),
    exempt={"copies": "all singular values become equal"},
)
class IsoCTS(MatrixMerger):
    r"""Keep the leading directions of the sum, add each expert's leading directions outside them, and give all one singular value.

    With c common directions :math:`(U_c, \sigma_c, V_c)` of :math:`\sum_t \tau_t` and the s = (min(m, n) - c) / T leading triplets of each
    :math:`\tau_t - U_c U_c^\top \tau_t`, all stacked to U, :math:`\sigma`, V,

    .. math:: M = \bar\sigma\, \operatorname{polar}(U)\, \operatorname{polar}(V)^\top .

    Tensors that are not matrices get the mean task vector.

    Args:
        common: share of the rank given to common directions, rounded so that the rest divides among the experts.

    Cost: T + 3 eigendecompositions of the smaller side.
    """

    scratch = 4.0

    def __init__(self, *, common: float = 0.8, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        in_range(common, "the common share", 0, 1)
        self.common = common

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:  # noqa: ARG002
        rank, T = min(D.shape[1:]), len(D)
        own = round((rank - int(rank * self.common)) / T)
        own -= own * T > rank
        c = rank - own * T
        stacked = [leading_triplets(D.sum(0), c)]
        U_c = stacked[0][0]
        for tau in D:
            tau -= U_c @ (U_c.T @ tau)
            stacked.append(leading_triplets(tau, own))
        U, s, Vh = (torch.cat([t[i] for t in stacked], dim=d) for i, d in ((0, 1), (1, 0), (2, 0)))
        if not len(s):
            return torch.zeros_like(W0)
        return (polar(U)[0] @ polar(Vh)[0]).mul_(s.sum() / rank)

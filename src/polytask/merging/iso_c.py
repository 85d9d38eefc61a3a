"""Iso-C: isotropic merging in the common subspace (Marczak et al., ICML 2025, arXiv:2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import MatrixMerger, Place
from polytask.merging.spectral import polar
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "iso_c",
    family="merging",
    paper="arXiv:2502.04959",
    needs="base",
    aliases=("isoc", "isotropic_merging"),
    invariances=("permutation", "scale", "rotation"),
    exempt={"copies": "all singular values become equal"},
)
class IsoC(MatrixMerger):
    r"""Add up the task vectors and give the sum one singular value: its mean.

    .. math:: \sum_t \tau_t = U \operatorname{diag}(\sigma)\, V^\top, \qquad M = \bar\sigma\, U V^\top

    Tensors that are not matrices get the mean task vector.

    Cost: one eigendecomposition of the smaller side.
    """

    scratch = 2.0

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:  # noqa: ARG002
        direction, sigma = polar(D.sum(0))
        return direction.mul_(sigma.mean())

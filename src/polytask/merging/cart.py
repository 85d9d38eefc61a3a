"""CART: centred, low-rank task vectors (Choi et al., 2024, arXiv:2412.12153)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from polytask.merging.base import MatrixMerger, Place, TaskVectorOptions, in_range
from polytask.merging.spectral import leading_triplets
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "cart",
    family="merging",
    paper="arXiv:2412.12153",
    needs="base",
    aliases=("centered_task_vectors",),
    invariances=("permutation", "copies", "scale", "rotation"),
)
class CART(MatrixMerger):
    r"""Start from the mean of the experts and add the leading directions in which each departs from it.

    .. math:: M = \bar\tau + \eta \sum_t \operatorname{SVD}_k(\tau_t - \bar\tau), \qquad \bar\tau = \tfrac1T \sum_t \tau_t, \quad
        k = \lceil\rho \min(m, n)\rceil

    The base only anchors the sum: the outcome does not depend on it. Tensors that are not matrices get the mean task vector.

    Args:
        rank: :math:`\rho`, the share of the rank kept; the paper's best values lie between 0.04 and 0.32.
        departure: :math:`\eta`, factor of the departures.

    Cost: T eigendecompositions of the smaller side.
    """

    scratch = 2.0

    def __init__(self, *, rank: float = 0.08, departure: float = 1.0, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        in_range(rank, "the rank of cart", 0, 1, open_low=True)
        self.rank, self.departure = rank, departure

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:  # noqa: ARG002
        k = -int(-self.rank * min(D.shape[1:]) // 1)
        mean = D.mean(0)
        D -= mean
        for tau in D:
            U, s, Vh = leading_triplets(tau, k)
            mean.addmm_(U * s, Vh, alpha=self.departure)
        return mean

"""SVC: singular value calibration (Li et al., ICML 2026, arXiv:2602.05536)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import MatrixMerger, Place, TaskVectorOptions, in_range
from polytask.merging.inner import inner_merger
from polytask.merging.spectral import NEGLIGIBLE, leading_triplets
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "svc",
    family="merging",
    paper="arXiv:2602.05536",
    needs="base",
    aliases=("singular_value_calibration",),
    invariances=("permutation", "copies", "scale", "rotation"),
)
class SVC(MatrixMerger):
    r"""Merge by another method, then shrink the singular values in which experts' common knowledge was counted several times.

    .. math:: M = U \operatorname{diag}(\sigma)\, V^\top, \qquad
        s_r^t = \frac{\langle u_r^\top M,\; u_r^\top \tau_t\rangle}{\lVert u_r^\top \tau_t\rVert^2}, \qquad
        \gamma_r = \frac{T}{\sum_t \max(\alpha, s_r^t)}, \qquad M' = U \operatorname{diag}(\gamma \sigma)\, V^\top

    :math:`s_r^t` tells how many times the merged response along :math:`u_r` repeats that of expert t: T where all experts agree in it, 1
    where they do not meet. The gain shown by the authors is over a sum with scale 1; compare it with the same method at its best scale.
    Tensors that are not matrices get the mean task vector.

    Args:
        inner: the method that is calibrated, any merger of task vectors.
        inner_options: its options.
        alpha: :math:`\alpha`, the least a coefficient counts.

    Cost: the inner method's, one eigendecomposition of the smaller side and one product with every task vector.
    """

    scratch = 4.0
    scratch_per_expert = 1.0

    def __init__(
        self,
        *,
        inner: str = "task_arithmetic",
        inner_options: dict[str, object] | None = None,
        alpha: float = 1.0,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        in_range(alpha, "alpha of svc", 0, float("inf"), open_low=True)
        self.inner, self.alpha = inner_merger(self, inner, inner_options), alpha

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:
        U, sigma, Vh = leading_triplets(self.inner.update(W0, D.clone(), place), min(W0.shape))
        merged = sigma[:, None] * Vh
        counted = torch.zeros_like(sigma)
        for tau in D:
            response = U.T @ tau
            size = response.square().sum(1)
            # a response that is nothing but rounding has no direction that the merged one could repeat
            heard = size > NEGLIGIBLE**2 * size.sum()
            s = torch.where(heard, (merged * response).sum(1) / torch.where(heard, size, 1.0), 0.0)
            counted += s.clamp_min(self.alpha)
        return (U * (len(D) * sigma / counted)) @ Vh

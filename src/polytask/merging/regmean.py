"""RegMean (Jin et al., ICLR 2023, arXiv:2212.09849)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.merging.base import Place, WeightMerger, in_range
from polytask.merging.moments import gramian
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "regmean",
    family="merging",
    paper="arXiv:2212.09849",
    needs="statistics",
    aliases=("RegMean", "regression_mean"),
    invariances=("permutation", "copies", "scale"),
)
class RegMean(WeightMerger):
    r"""Make each linear layer agree with every expert's outputs on that expert's inputs, in the least-squares sense.

    .. math:: W = \Bigl(\sum_t W_t \tilde G_t\Bigr) \Bigl(\sum_t \tilde G_t\Bigr)^{+}, \qquad
        \tilde G_t = \alpha G_t + (1 - \alpha) \operatorname{diag} G_t, \quad G_t = X_t^\top X_t

    with the Gramians :math:`G_t` of the layer's inputs, from :func:`~polytask.merging.gather_gramians`. Tensors without them are averaged.
    RegMean++ is this same formula on Gramians gathered, layer by layer, behind the layers merged already.

    Args:
        alpha: :math:`\alpha`, what off-diagonal entries are multiplied by; below 1 the system is well-conditioned.

    Cost: one n x n solve in float64 a layer of n inputs.
    """

    needs = "statistics"
    statistic = "gramian"
    scratch = 4.0

    def __init__(self, *, alpha: float = 0.9) -> None:
        in_range(alpha, "alpha of regmean", 0, 1)
        self.alpha = alpha

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if W.ndim != 3 or not place.statistics:
            return W.mean(0)
        right = torch.zeros(W.shape[1:], dtype=torch.float64)
        left = torch.zeros(W.shape[2], W.shape[2], dtype=torch.float64)
        for Wt, St in zip(W, place.statistics, strict=True):
            full = gramian(St)
            G = self.alpha * full + (1 - self.alpha) * torch.diag(full.diagonal())
            right += Wt.double() @ G
            left += G
        # directions that no input had keep the mean instead of vanishing
        mean = W.double().mean(0)
        rest = right - mean @ left
        factor, failed = torch.linalg.cholesky_ex(left)
        fitted = rest @ torch.linalg.pinv(left, hermitian=True) if failed else torch.cholesky_solve(rest.T, factor).T
        return (mean + fitted).to(W.dtype)

"""Weighted averaging of models (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.errors import InputError
from polytask.merging.base import PerExpert, Place, WeightMerger, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "weighted",
    family="merging",
    paper="arXiv:2203.05482",
    needs="experts",
    aliases=("linear", "weighted_average"),
    invariances=("permutation", "copies", "scale"),
)
class Weighted(WeightMerger):
    r"""Take a weighted mean of the experts' weights.

    .. math:: W = \frac{\sum_t w_t W_t}{\sum_t w_t}

    Args:
        weights: :math:`w_t`, one number for all experts or one each.
        normalize: False leaves the denominator out.

    Cost: one pass over the weights.
    """

    def __init__(self, *, weights: PerExpert = 1.0, normalize: bool = True) -> None:
        in_range(weights, "a weight", float("-inf"), float("inf"), each=True)
        self.weights, self.normalize = weights, normalize

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        w = per_expert(self.weights, len(W), "weights")
        if self.normalize and abs(sum(w)) < 1e-8:
            raise InputError("the weights sum to 0: a weighted mean needs another sum, or normalize=False")
        total = sum(w) if self.normalize else 1.0
        return (W.new_tensor(w) / total @ W.view(len(W), -1)).view(W.shape[1:])

"""Uniform averaging, a uniform model soup (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import Place, WeightMerger
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "average",
    family="merging",
    paper="arXiv:2203.05482",
    needs="experts",
    aliases=("simple_average", "uniform_soup", "mean"),
    invariances=("permutation", "copies", "scale"),
)
class Average(WeightMerger):
    r"""Take the mean of the experts' weights.

    .. math:: W = \frac1T \sum_t W_t

    Cost: one pass over the weights.
    """

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        return W.mean(0)

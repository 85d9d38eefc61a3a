"""Fisher merging (Matena & Raffel, NeurIPS 2022, arXiv:2111.09832)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import PerExpert, Place, WeightMerger, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "fisher",
    family="merging",
    paper="arXiv:2111.09832",
    needs="statistics",
    aliases=("fisher_merging",),
    invariances=("permutation", "copies", "scale"),
)
class Fisher(WeightMerger):
    r"""Average the experts entry by entry, each as much as it cares about its value there.

    .. math:: W = \frac{\sum_t w_t F_t \odot W_t}{\sum_t w_t F_t}

    with the diagonal of the Fisher information :math:`F_t`, from :func:`~polytask.merging.gather_fisher`. Tensors for which an
    expert has none are averaged.

    Args:
        weights: :math:`w_t`, one number for all experts or one each.
        floor: added to every :math:`F_t`, relative to the mean of all of them in the tensor: where no expert cares, all count alike.

    Cost: one pass over weights and statistics.
    """

    needs = "statistics"
    statistic = "fisher"
    scratch = 4.0

    def __init__(self, *, weights: PerExpert = 1.0, floor: float = 1e-6) -> None:
        in_range(floor, "the floor of fisher", 0, float("inf"), open_low=True)
        in_range(weights, "a weight", float("-inf"), float("inf"), each=True)
        self.weights, self.floor = weights, floor

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if not place.statistics:
            return W.mean(0)
        w = per_expert(self.weights, len(W), "weights")
        total = sum(float(F.mean()) for F in place.statistics) / len(W)
        above, below = W.new_zeros(W.shape[1:]), W.new_zeros(W.shape[1:])
        for t, row in enumerate(W):
            F = place.statistics[t] / total if total > 0 else row.new_zeros(())
            F = (F + self.floor).to(row.dtype) * w[t]
            below += F
            above += row.mul_(F)
        return above.div_(below)

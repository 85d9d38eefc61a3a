"""Task Arithmetic (Ilharco et al., ICLR 2023, arXiv:2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import PerExpert, Place, TaskVectorMerger, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "task_arithmetic",
    family="merging",
    paper="arXiv:2212.04089",
    needs="base",
    aliases=("TA", "task_addition"),
    invariances=("permutation", "scale"),
    exempt={"copies": "a sum of task vectors, not a mean"},
)
class TaskArithmetic(TaskVectorMerger):
    r"""Add all task vectors to the base, shortened by one factor.

    .. math:: W = W_0 + \lambda \sum_t w_t (W_t - W_0)

    Args:
        scale: :math:`\lambda`; 0.3 is what validation chooses most often for eight tasks, 1 / T makes it the average.
        weights: :math:`w_t`, one number for all experts or one each.
        normalize: divide by the sum of the weights, unless that is 0.

    Cost: one pass over the weights.
    """

    def __init__(self, *, scale: float = 0.3, weights: PerExpert = 1.0, normalize: bool = False) -> None:
        super().__init__(scale=scale, weights=weights)
        self.normalize = normalize

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        total = D.sum(0)
        whole = sum(per_expert(self.weights, len(D), "weights"))
        return total.div_(whole) if self.normalize and abs(whole) >= 1e-8 else total

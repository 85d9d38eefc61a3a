"""Equal weighting, or unitary scalarization: the sum of the losses (the baseline of every comparison)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import LossWeighting
from polytask.registry import register


@register(
    "equal",
    family="balancing",
    paper="arXiv:2201.04122",
    needs="losses",
    aliases=("EW", "LS", "unitary", "sum", "linear_scalarization"),
    invariances=("permutation", "scale", "single"),
)
class Equal(LossWeighting):
    r"""Add the losses, each times its preference.

    .. math:: L = \sum_i p_i L_i, \qquad p_i = 1 \text{ unless told otherwise}

    With a ``preference`` this is (static) scalarization, weights scaled to sum to the number of tasks present.

    Cost: nothing beyond the sum. Source: Kurin et al., NeurIPS 2022 (arXiv:2201.04122) for why it is the bar to clear.
    """

    reads_values = False

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        if self.preference is None:
            return losses.sum(), losses.detach().new_ones(len(losses))
        w = losses.new_tensor(self.p)
        return (w * losses).sum(), w

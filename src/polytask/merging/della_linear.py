"""DELLA's dropping with a weighted sum (Deep et al., 2024, arXiv:2406.11617)."""

from __future__ import annotations

from typing import Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.magprune import MagPrune
from polytask.merging.sparse import SparseMerger
from polytask.registry import register


@register(
    "della_linear",
    family="merging",
    paper="arXiv:2406.11617",
    needs="base",
    invariances=("scale",),
    exempt={
        "permutation": "each expert's mask is drawn by its position",
        "copies": "each copy is dropped with its own mask",
    },
)
class DellaLinear(SparseMerger):
    r"""Drop entries at random by their rank of magnitude, and add up the task vectors.

    .. math:: M = \sum_t w_t\, \mathrm{MagPrune}(\tau_t)

    Args:
        density: the mean share kept; one number or one an expert.
        epsilon: the width of the range of keep probabilities, see :class:`~polytask.merging.magprune.MagPrune`.
        rescale: divide what is kept by its keep probability.
        normalize: divide by the weights that took part.

    Cost: a sort of each row, one random number an entry.
    """

    elect = False

    def __init__(
        self,
        *,
        density: PerExpert = 0.5,
        epsilon: PerExpert = 0.2,
        rescale: bool = True,
        normalize: bool = False,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        self.sparsify, self.normalize = MagPrune(density=density, epsilon=epsilon, rescale=rescale), normalize

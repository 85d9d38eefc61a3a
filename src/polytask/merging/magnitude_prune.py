"""Magnitude-pruned task arithmetic (the combination of that name in Hugging Face's PEFT)."""

from __future__ import annotations

from typing import Literal, Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.sparse import SparseMerger
from polytask.merging.trim import Trim
from polytask.registry import register


@register(
    "magnitude_prune",
    family="merging",
    paper="arXiv:2306.01708",
    needs="base",
    invariances=("permutation", "scale"),
    exempt={"copies": "trimmed entries are gone for good"},
)
class MagnitudePrune(SparseMerger):
    r"""Add up task vectors of which only the largest entries were kept.

    .. math:: M = \sum_t w_t\, \tau_t \odot [\,|\tau_t| \ge \theta_t\,]

    Args:
        density: the share kept.
        normalize: divide by the sum of the weights.
        scope: where the thresholds are looked for, see :class:`~polytask.merging.trim.Trim`.

    Cost: as TIES without its election.
    """

    elect = False

    def __init__(
        self,
        *,
        density: PerExpert = 0.2,
        normalize: bool = False,
        scope: Literal["tensor", "model"] = "tensor",
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        self.sparsify, self.normalize = Trim(density=density, scope=scope), normalize

"""MagMax (Marczak et al., ECCV 2024, arXiv:2407.06322)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.merging.base import PerExpert, Place, TaskVectorMerger, chunks
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "magmax",
    family="merging",
    paper="arXiv:2407.06322",
    needs="base",
    aliases=("max_magnitude",),
    invariances=("permutation", "copies", "scale"),
)
class MagMax(TaskVectorMerger):
    r"""Take each entry from the expert that moved it furthest.

    .. math:: M_j = (\tau_{t^*})_j, \qquad t^* = \arg\max_t\, \lvert (w_t \tau_t)_j \rvert

    Made for experts fine-tuned one after another; for independent ones the authors' script takes half of M. Where two entries are
    equally large the positive one stands, so that the order of the experts does not matter; the authors take the later expert's.

    Args:
        scale: factor of the merged task vector.
        weights: :math:`w_t`, one number for all experts or one each, multiplied to the task vectors.

    Cost: two passes over the task vectors.
    """

    def __init__(self, *, scale: float = 0.5, weights: PerExpert = 1.0) -> None:
        super().__init__(scale=scale, weights=weights)

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        merged = torch.empty_like(D[0])
        for where, d in chunks(D):
            low, high = d.aminmax(dim=0)
            merged.view(-1)[where] = torch.where(high >= -low, high, low)
        return merged

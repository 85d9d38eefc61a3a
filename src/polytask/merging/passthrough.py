"""Passing one model through: for stacking its layers anew, in mergekit's files (Goddard et al., EMNLP 2024, arXiv:2403.13257)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import Place, WeightMerger, in_range
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "passthrough",
    family="merging",
    paper="arXiv:2403.13257",
    needs="experts",
    invariances=("copies", "scale"),
    exempt={"permutation": "there is but one model"},
)
class PassThrough(WeightMerger):
    r"""Take one model as it is, or multiplied by a number.

    .. math:: W = s\, W_1

    In mergekit's files the layers of a model, or of several, are stacked in this way, some of them perhaps twice; a scale of 0 for what
    a block adds to its input makes it an identity.

    Args:
        scale: s.

    Cost: one pass over the weights.
    """

    most = 1

    def __init__(self, *, scale: float = 1.0) -> None:
        in_range(scale, "the scale", float("-inf"), float("inf"))
        self.scale = scale

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        return W[0] if self.scale == 1 else W[0].mul_(self.scale)

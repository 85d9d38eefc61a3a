"""SIFT: PACT without its per-task step (Shi et al. 2026, appendix of arXiv:2606.18627)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polytask.merging.base import Filter, Place, as_patterns, in_range
from polytask.merging.matching import skipped
from polytask.merging.subspaces import right_basis, without
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "sift",
    family="filter",
    paper="arXiv:2606.18627",
    needs="base",
    aliases=("static_pact",),
    invariances=("permutation", "scale"),
    exempt={"copies": "updates of the core's directions are gone for good"},
    example={"core_ratio": 0.2},
)
class SIFT(Filter):
    r"""Keep every task vector off the leading input directions of the base.

    .. math:: \tau_t' = \tau_t (I - V_0 V_0^\top)

    with the K leading right singular vectors :math:`V_0` of :math:`W_0`. Tensors that are not matrices pass unchanged.

    Args:
        core_ratio: K as a part of the smaller side.
        exclude: patterns of tensors that are not filtered.

    Cost: one eigendecomposition of the smaller side.
    """

    scratch = 2.0

    def __init__(self, *, core_ratio: float = 0.05, exclude: Sequence[str] = ("*text_projection*",)) -> None:
        in_range(core_ratio, "core_ratio of sift", 0, 1)
        self.core_ratio, self.exclude = core_ratio, as_patterns(exclude)

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if W0.ndim == 2 and W0.numel() and not skipped(place.name, self.exclude):
            V0 = right_basis(W0, int(self.core_ratio * min(W0.shape)))
            for tau in D:
                tau.copy_(without(tau, V0))
        return D

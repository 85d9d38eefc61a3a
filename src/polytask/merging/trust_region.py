"""The trust region of TATR: entries that no two experts claim at once (Sun et al., ICLR 2025, arXiv:2501.15065)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from polytask.errors import InputError
from polytask.merging.base import Filter, Place, in_range
from polytask.merging.magnitudes import Census, kth_largest_magnitude
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "trust_region",
    family="filter",
    paper="arXiv:2501.15065",
    needs="base",
    invariances=("permutation", "scale"),
    exempt={"copies": "entries outside the trust region are gone for good"},
)
class TrustRegion(Filter):
    r"""Set those entries of all task vectors to zero in which one expert's change would cost the others most.

    .. math:: \tau'_t = \tau_t \odot [\,\Omega < \theta\,], \qquad \Omega = \sum_{s \ne t} |g_s| \odot |\tau_t|, \qquad g_s \approx \tau_s

    with :math:`\theta` the q-quantile of :math:`\Omega`'s entries. The gradient :math:`g_s` of task s at the base is the task vector
    itself, which sums up such gradients: the form without data. Entries that a single expert moved stay, whatever q.

    Args:
        quantile: q.
        scope: where the quantile is taken: ``tensor`` or, as in the paper, ``model``, for the price of reading the model three times.

    Cost: a few passes over the task vectors.
    """

    scratch = 5.0

    def __init__(self, *, quantile: float = 0.99, scope: Literal["tensor", "model"] = "tensor") -> None:
        in_range(quantile, "the quantile of a trust region", 0, 1)
        if scope not in ("tensor", "model"):
            raise InputError(f"the scope of a trust region is 'tensor' or 'model', not {scope!r}")
        self.quantile, self.scope = quantile, scope
        self.begin()

    def begin(self) -> None:
        self.passes = 2 if self.scope == "model" else 0
        self.census: Census | None = None
        self.rank = 0

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:  # noqa: ARG002
        if self.census is None:
            self.census, self.passes = Census(D.dtype), D.dtype.itemsize * 8 // 16
        self.census.see(conflict(D))

    def end_pass(self) -> None:
        if self.census is not None:
            self.rank = self.census.end_round(self.rank or self.outside(self.census.total))

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        if not D[0].numel():
            return D
        Omega = conflict(D)
        theta = self.census.value if self.census else kth_largest_magnitude(Omega, self.outside(Omega.numel()))
        return D.mul_((Omega < theta) | (Omega == 0))

    def outside(self, entries: int) -> int:
        """How many entries lie at the quantile or above it, at least one."""
        return max(1, entries - int(self.quantile * entries))


def conflict(D: Float[Tensor, "experts ..."]) -> Float[Tensor, "..."]:
    r"""Half of :math:`\Omega`, whose pairs count twice."""
    Omega, before = torch.zeros_like(D[0]), torch.zeros_like(D[0])
    for tau in D:
        Omega.addcmul_(before, tau.abs())
        before += tau.abs()
    return Omega

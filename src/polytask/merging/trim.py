"""Magnitude trimming, the first step of TIES (Yadav et al., NeurIPS 2023, arXiv:2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from polytask.errors import InputError
from polytask.merging.base import Filter, PerExpert, Place, chunks, in_range, per_expert
from polytask.merging.magnitudes import Census, kth_largest_magnitude
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "trim",
    family="filter",
    paper="arXiv:2306.01708",
    needs="base",
    invariances=("permutation", "scale"),
    exempt={"copies": "trimmed entries are gone for good"},
)
class Trim(Filter):
    r"""Keep the largest entries of each task vector and set the others to zero.

    .. math:: \tau'_t = \tau_t \odot [\,|\tau_t| \ge \theta_t\,], \qquad \theta_t \text{ the } \lfloor \rho n \rfloor\text{-th largest of }
        |\tau_t|

    Entries that tie with the last one kept are kept too.

    Args:
        density: :math:`\rho`, the share kept; one number or one an expert.
        scope: ``tensor`` looks for the threshold in each tensor, as streaming merges do; ``model`` in the whole task vector, as the
            paper does, for the price of reading the model three times.

    Cost: two passes of counting over each task vector, one of zeroing.
    """

    def __init__(self, *, density: PerExpert = 0.2, scope: Literal["tensor", "model"] = "tensor") -> None:
        in_range(density, "the density", 0, 1, open_low=True, each=True)
        if scope not in ("tensor", "model"):
            raise InputError(f"the scope of trimming is 'tensor' or 'model', not {scope!r}")
        self.density, self.scope = density, scope
        self.begin()

    def begin(self) -> None:
        self.passes = 2 if self.scope == "model" else 0
        self.censuses: list[Census] = []
        self.ranks: list[int] = []
        self._shares: list[float] = []

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:  # noqa: ARG002
        if not self.censuses:
            self.censuses = [Census(D.dtype) for _ in D]
            self._shares = per_expert(self.density, len(D), "density")
            self.passes = D.dtype.itemsize * 8 // 16
        for census, row in zip(self.censuses, D, strict=True):
            census.see(row)

    def end_pass(self) -> None:
        if not self.ranks:
            self.ranks = [max(1, int(rho * c.total)) for rho, c in zip(self._shares, self.censuses, strict=True)]
        self.ranks = [c.end_round(k) for c, k in zip(self.censuses, self.ranks, strict=True)]

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        shares = per_expert(self.density, len(D), "density")
        for t, (row, rho) in enumerate(zip(D, shares, strict=True)):
            if rho < 1 and row.numel():
                theta = (
                    self.censuses[t].value
                    if self.scope == "model"
                    else kth_largest_magnitude(row, max(1, int(rho * row.numel())))
                )
                for _, piece in chunks(row[None]):
                    piece.mul_(piece.abs() >= theta)
        return D

"""Model Breadcrumbs' masks (Davari & Belilovsky, ECCV 2024, arXiv:2312.06795)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import Filter, PerExpert, Place, chunks, in_range, per_expert
from polytask.merging.magnitudes import kth_largest_magnitude
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "outliers",
    family="filter",
    paper="arXiv:2312.06795",
    needs="base",
    invariances=("permutation", "scale"),
    exempt={"copies": "masked entries are gone for good"},
)
class Outliers(Filter):
    r"""Set both the largest and the smallest entries of each tensor's task vector to zero.

    .. math:: \tau'_t = \tau_t \odot [\,\theta^{low}_t \le |\tau_t| < \theta^{high}_t\,]

    The thresholds leave the share :math:`\gamma` of the largest entries out and keep the share :math:`\rho` below them; where
    :math:`\gamma + \rho > 1`, fewer large ones are left out.

    Args:
        density: :math:`\rho`, the share kept; one number or one an expert.
        gamma: :math:`\gamma`, the share of the largest entries left out; one number or one an expert.

    Cost: four passes of counting over each task vector, one of zeroing.
    """

    def __init__(self, *, density: PerExpert = 0.9, gamma: PerExpert = 0.01) -> None:
        in_range(density, "the density", 0, 1, open_low=True, each=True)
        in_range(gamma, "gamma", 0, 1, each=True)
        self.density, self.gamma = density, gamma

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        shares = per_expert(self.density, len(D), "density")
        tops = per_expert(self.gamma, len(D), "gamma")
        for row, rho, gamma in zip(D, shares, tops, strict=True):
            n = row.numel()
            kept = max(1, int(rho * n))
            if rho >= 1 or not n:
                continue
            top = min(int(gamma * n), n - kept)
            low = kth_largest_magnitude(row, top + kept)
            high = kth_largest_magnitude(row, top) if top else float("inf")
            for _, piece in chunks(row[None]):
                size = piece.abs()
                piece.mul_((size >= low) & (size < high))
        return D

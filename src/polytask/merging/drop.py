"""DARE's dropping (Yu et al., ICML 2024, arXiv:2311.03099)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.merging.base import Filter, PerExpert, Place, chunks, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "drop",
    family="filter",
    paper="arXiv:2311.03099",
    needs="base",
    invariances=("scale",),
    exempt={
        "permutation": "each expert's mask is drawn by its position",
        "copies": "each copy is dropped with its own mask",
    },
)
class Drop(Filter):
    r"""Drop entries of each task vector at random and enlarge the others, so that its expectation stays.

    .. math:: \tau'_t = \frac{m_t \odot \tau_t}{\rho}, \qquad m_t \sim \mathrm{Bernoulli}(\rho)

    Args:
        density: :math:`\rho = 1 - p`, the share kept; one number or one an expert.
        rescale: divide by the density.

    Cost: one random number an entry.
    """

    def __init__(self, *, density: PerExpert = 0.5, rescale: bool = True) -> None:
        in_range(density, "the density", 0, 1, open_low=True, each=True)
        self.density, self.rescale = density, rescale

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        for t, (row, rho) in enumerate(zip(D, per_expert(self.density, len(D), "density"), strict=True)):
            if rho < 1:
                generator = place.generator(t)
                for _, piece in chunks(row[None]):
                    piece *= torch.rand(piece.shape, generator=generator, dtype=torch.float32) < rho
                    if self.rescale:
                        piece /= rho
        return D

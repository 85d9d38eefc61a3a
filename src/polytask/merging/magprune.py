"""DELLA's MagPrune (Deep et al., 2024, arXiv:2406.11617)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError
from polytask.merging.base import CHUNK, Filter, PerExpert, Place, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "magprune",
    family="filter",
    paper="arXiv:2406.11617",
    needs="base",
    invariances=("scale",),
    exempt={
        "permutation": "each expert's mask is drawn by its position",
        "copies": "each copy is dropped with its own mask",
    },
)
class MagPrune(Filter):
    r"""Drop entries at random, small ones of a row more often than large ones, and enlarge the others by what they risked.

    With the rank :math:`r_i \in \{0, \dots, n - 1\}` of :math:`|\tau_i|` within its row of n,

    .. math:: q_i = \rho - \tfrac{\varepsilon}{2} + \varepsilon \frac{r_i}{n - 1}, \qquad \tau'_i = \frac{m_i}{q_i} \tau_i, \quad
        m_i \sim \mathrm{Bernoulli}(q_i)

    Args:
        density: :math:`\rho`, the mean share kept; one number or one an expert.
        epsilon: :math:`\varepsilon`, the width of the range of keep probabilities. mergekit's number of this name is half of it.
        rescale: divide by the keep probabilities.

    Cost: a sort of each row and one random number an entry.
    """

    def __init__(self, *, density: PerExpert = 0.5, epsilon: PerExpert = 0.2, rescale: bool = True) -> None:
        in_range(density, "the density", 0, 1, open_low=True, each=True)
        in_range(epsilon, "epsilon", 0, 1, each=True)
        self.density, self.epsilon, self.rescale = density, epsilon, rescale

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        densities, widths = (
            per_expert(v, len(D), n) for v, n in ((self.density, "density"), (self.epsilon, "epsilon"))
        )
        for t, (tau, rho, eps) in enumerate(zip(D, densities, widths, strict=True)):
            if rho >= 1:
                continue
            if rho - eps / 2 <= 0 or rho + eps / 2 >= 1:
                raise InputError(f"keep probabilities of {rho:g} +- {eps / 2:g} leave the range between 0 and 1")
            generator = place.generator(t)
            rows = tau.view(1, -1) if tau.ndim < 2 else tau.flatten(1)
            n = rows.shape[1]
            at_rank = torch.linspace(rho - eps / 2, rho + eps / 2, n, dtype=D.dtype) if n > 1 else D.new_full((n,), rho)
            for block in rows.split_with_sizes(_blocks(rows)):
                order = block.abs().argsort(dim=1, stable=True)
                q = torch.empty_like(block).scatter_(1, order, at_rank.expand_as(block))
                mask = torch.bernoulli(q, generator=generator)
                block.mul_(mask.div_(q) if self.rescale else mask)
        return D


def _blocks(rows: Tensor) -> list[int]:
    # as many rows at a time as fit into the scratch memory of elementwise methods, and at least one
    size = max(1, CHUNK // max(1, rows.shape[1]))
    full, rest = divmod(len(rows), size)
    return [size] * full + [rest] * (rest > 0)

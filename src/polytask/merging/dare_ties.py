"""DARE before TIES' election of signs (Yu et al., ICML 2024, arXiv:2311.03099)."""

from __future__ import annotations

from typing import Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.drop import Drop
from polytask.merging.sparse import SparseMerger
from polytask.registry import register


@register(
    "dare_ties",
    family="merging",
    paper="arXiv:2311.03099",
    needs="base",
    aliases=("dare_ties_merging",),
    invariances=("scale",),
    exempt={
        "permutation": "each expert's mask is drawn by its position",
        "copies": "each copy is dropped with its own mask",
    },
)
class DareTies(SparseMerger):
    r"""Drop entries of the task vectors at random, enlarge the others, and add up those of the elected sign.

    .. math:: \tau'_t = \frac{m_t \odot \tau_t}{\rho}, \quad m_t \sim \mathrm{Bernoulli}(\rho),
        \qquad s = \operatorname{sign} \sum_t w_t \tau'_t, \quad
        M = \sum_t w_t \tau'_t\,[w_t \tau'_t s > 0]

    Args:
        density: :math:`\rho`, the share kept; one number or one an expert.
        rescale: divide what is kept by its density.
        normalize: divide by the weights that took part.

    Cost: one random number an entry and TIES' election.
    """

    elect = True

    def __init__(
        self,
        *,
        density: PerExpert = 0.5,
        rescale: bool = True,
        normalize: bool = False,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        self.sparsify, self.normalize = Drop(density=density, rescale=rescale), normalize

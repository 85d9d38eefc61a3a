"""DARE with a weighted sum (Yu et al., ICML 2024, arXiv:2311.03099)."""

from __future__ import annotations

from typing import Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.drop import Drop
from polytask.merging.sparse import SparseMerger
from polytask.registry import register


@register(
    "dare_linear",
    family="merging",
    paper="arXiv:2311.03099",
    needs="base",
    aliases=("dare", "dare_task_arithmetic"),
    invariances=("scale",),
    exempt={
        "permutation": "each expert's mask is drawn by its position",
        "copies": "each copy is dropped with its own mask",
    },
)
class DareLinear(SparseMerger):
    r"""Drop entries of the task vectors at random, enlarge the others, and add them up.

    .. math:: M = \sum_t w_t \frac{m_t \odot \tau_t}{\rho}, \qquad m_t \sim \mathrm{Bernoulli}(\rho)

    Args:
        density: :math:`\rho`, the share kept; one number or one an expert.
        rescale: divide what is kept by its density.
        normalize: divide by the weights that took part.

    Cost: one random number an entry.
    """

    elect = False

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

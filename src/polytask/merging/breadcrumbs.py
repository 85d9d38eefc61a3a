"""Model Breadcrumbs (Davari & Belilovsky, ECCV 2024, arXiv:2312.06795)."""

from __future__ import annotations

from typing import Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.outliers import Outliers
from polytask.merging.sparse import SparseMerger
from polytask.registry import register


@register(
    "breadcrumbs",
    family="merging",
    paper="arXiv:2312.06795",
    needs="base",
    aliases=("model_breadcrumbs",),
    invariances=("permutation", "scale"),
    exempt={"copies": "masked entries are gone for good"},
)
class Breadcrumbs(SparseMerger):
    r"""Add up task vectors without their smallest and their very largest entries.

    .. math:: M = \sum_t w_t\, \tau_t \odot [\,\theta^{low}_t \le |\tau_t| < \theta^{high}_t\,]

    Args:
        density: the share kept; one number or one an expert.
        gamma: the share of the largest entries left out.
        normalize: divide by the weights that took part.

    Cost: four passes of counting over each task vector.
    """

    elect = False

    def __init__(
        self,
        *,
        density: PerExpert = 0.9,
        gamma: PerExpert = 0.01,
        normalize: bool = False,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        self.sparsify, self.normalize = Outliers(density=density, gamma=gamma), normalize

"""Model Breadcrumbs before TIES' election of signs (the combination of that name in mergekit)."""

from __future__ import annotations

from typing import Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.outliers import Outliers
from polytask.merging.sparse import SparseMerger
from polytask.registry import register


@register(
    "breadcrumbs_ties",
    family="merging",
    paper="arXiv:2312.06795",
    needs="base",
    invariances=("permutation", "scale"),
    exempt={"copies": "masked entries are gone for good"},
)
class BreadcrumbsTies(SparseMerger):
    r"""Leave the smallest and the very largest entries out, and add up those of the elected sign.

    .. math:: \tau'_t = \tau_t \odot [\,\theta^{low}_t \le |\tau_t| < \theta^{high}_t\,],
        \quad s = \operatorname{sign} \sum_t w_t \tau'_t, \quad
        M = \sum_t w_t \tau'_t\,[w_t \tau'_t s > 0]

    Args:
        density: the share kept; one number or one an expert.
        gamma: the share of the largest entries left out.
        normalize: divide by the weights that took part.

    Cost: four passes of counting over each task vector and TIES' election.
    """

    elect = True

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

"""TATR: task arithmetic in the trust region (Sun et al., ICLR 2025, arXiv:2501.15065)."""

from __future__ import annotations

from typing import Literal

from polytask.merging.base import PerExpert
from polytask.merging.sparse import SparseMerger
from polytask.merging.trust_region import TrustRegion
from polytask.registry import register


@register(
    "tatr",
    family="merging",
    paper="arXiv:2501.15065",
    needs="base",
    aliases=("trust_region_task_arithmetic",),
    invariances=("permutation", "scale"),
    exempt={"copies": "a sum of task vectors, not a mean"},
)
class TATR(SparseMerger):
    r"""Add task vectors up where one expert's change costs the others little.

    .. math:: M = \sum_t w_t\, \tau_t \odot [\,\Omega < \theta\,], \qquad \Omega = \sum_{s \ne t} |\tau_s| \odot |\tau_t|

    with :math:`\theta` the q-quantile of :math:`\Omega`'s entries. Before other methods the filter ``trust_region`` does the same. This is
    the form without data, where task vectors take the place of the gradients of each task's loss at the base, which the paper measures on
    a few labelled examples.

    Args:
        quantile: q.
        scope: where the quantile is taken, see :class:`~polytask.merging.trust_region.TrustRegion`.
        scale: as in task arithmetic.
        weights: :math:`w_t`, one number for all experts or one each.

    Cost: a few passes over the task vectors.
    """

    elect, normalize = False, False
    scratch = 5.0

    def __init__(
        self,
        *,
        quantile: float = 0.99,
        scope: Literal["tensor", "model"] = "tensor",
        scale: float = 0.3,
        weights: PerExpert = 1.0,
    ) -> None:
        super().__init__(scale=scale, weights=weights)
        self.sparsify = TrustRegion(quantile=quantile, scope=scope)

"""TIES-Merging (Yadav et al., NeurIPS 2023, arXiv:2306.01708)."""

from __future__ import annotations

from typing import Literal, Unpack

from polytask.merging.base import PerExpert, TaskVectorOptions
from polytask.merging.sparse import SparseMerger
from polytask.merging.trim import Trim
from polytask.registry import register


@register(
    "ties",
    family="merging",
    paper="arXiv:2306.01708",
    needs="base",
    aliases=("ties_merging",),
    invariances=("permutation", "scale"),
    exempt={"copies": "trimmed entries are gone for good"},
)
class TIES(SparseMerger):
    r"""Trim small entries, elect a sign for each coordinate, and average the entries that have it.

    .. math:: \tau'_t = \text{largest share } \rho \text{ of } \tau_t, \quad s = \operatorname{sign} \sum_t w_t \tau'_t, \quad
        M = \frac{\sum_t w_t \tau'_t\,[w_t \tau'_t s > 0]}{\sum_t w_t\,[w_t \tau'_t s > 0]}

    Args:
        density: :math:`\rho`, the share kept; the paper keeps the top 20 %.
        normalize: False adds instead of averaging.
        scope: where the thresholds are looked for, see :class:`~polytask.merging.trim.Trim`.

    Cost: a few passes over the task vectors; memory as any elementwise method.
    """

    elect = True

    def __init__(
        self,
        *,
        density: PerExpert = 0.2,
        normalize: bool = True,
        scope: Literal["tensor", "model"] = "tensor",
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        self.sparsify, self.normalize = Trim(density=density, scope=scope), normalize

"""SCE: select, calculate, erase (Wan et al., FuseChat, 2024, arXiv:2402.16107)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, chunks, in_range
from polytask.merging.magnitudes import kth_largest_magnitude
from polytask.merging.sparse import add_up
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "sce",
    family="merging",
    paper="arXiv:2402.16107",
    needs="base",
    invariances=("permutation", "scale"),
    exempt={"copies": "entries on which all experts agree have no variance and are not selected"},
)
class SCE(TaskVectorMerger):
    r"""Select the entries that vary most between experts, weigh experts by their energy there, erase minority signs.

    .. math:: D'_t = \tau_t \odot [\operatorname{var}_t \tau_t \ge \theta], \quad
        w_t = \frac{\lVert D'_t\rVert^2}{\sum_s \lVert D'_s\rVert^2}, \quad
        M = \frac{\sum_t w_t D'_t\,[D'_t s > 0]}{\sum_t w_t\,[D'_t s > 0]}, \quad s = \operatorname{sign} \sum_t D'_t

    Args:
        select: share of the entries with non-zero variance that are selected; 1 selects all entries.

    Cost: a few passes over the task vectors.
    """

    def __init__(self, *, select: float = 0.1, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        in_range(select, "the selected share", 0, 1, open_low=True)
        self.select = select

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        if self.select < 1 and W0.numel():
            variance = torch.empty_like(D[0])
            for where, d in chunks(D):
                variance.view(-1)[where] = d.var(0, unbiased=False)
            varying = int(variance.count_nonzero())
            theta = kth_largest_magnitude(variance, max(1, int(self.select * varying)))
            for where, d in chunks(D):
                v = variance.view(-1)[where]
                d.mul_((v >= theta) & (v > 0))
            del variance
        energy = torch.stack([row.norm() for row in D]).square()
        w = energy / energy.sum() if energy.any() else torch.full_like(energy, 1 / len(D))
        # the election is by unweighted sums; what lost it is erased before the weighted mean
        for _, d in chunks(D):
            d.mul_(torch.where(d.sum(0) >= 0, d, -d) > 0)
        return add_up(D, w, elect=True, normalize=True)

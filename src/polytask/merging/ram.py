"""Reinforced agent merging (Yuan et al., 2026, arXiv:2601.13572)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, chunks, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "ram",
    family="merging",
    paper="arXiv:2601.13572",
    needs="base",
    invariances=("permutation",),
    exempt={
        "copies": "entries that moved by less than epsilon go back to the base",
        "scale": "epsilon, beyond which an entry counts as changed, is an absolute number",
    },
)
class RAM(TaskVectorMerger):
    r"""Average each entry over the experts that changed it.

    .. math:: M = \frac{\sum_t w_t \tau_t\, m_t}{\max(1, \sum_t m_t)}, \qquad m_t = [\,|\tau_t| > \epsilon\,]

    Training by reinforcement moves few entries, others for each task: what one expert alone changed is kept whole.

    Args:
        epsilon: :math:`\epsilon`, up to which an entry counts as unchanged.

    Cost: one pass over the task vectors.
    """

    weighs_itself = True

    def __init__(self, *, epsilon: float = 1e-5, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        in_range(epsilon, "epsilon of ram", 0, float("inf"))
        self.epsilon = epsilon

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        w = D.new_tensor(per_expert(self.weights, len(D), "weights"))[:, None]
        alone = w * self.emphasis(D)
        merged = torch.empty_like(D[0])
        for where, d in chunks(D):
            m = d.abs() > self.epsilon
            changed = m.sum(0)
            d.mul_(torch.where(changed == 1, alone, w)).mul_(m)
            merged.view(-1)[where] = d.sum(0) / changed.clamp_min(1)
        return merged

    def emphasis(self, D: Float[Tensor, "experts ..."]) -> Float[Tensor, "experts 1"]:
        """What entries that one expert alone changed are multiplied by."""
        return D.new_ones(len(D), 1)

"""Consensus merging of TALL masks (Wang et al., ICML 2024, arXiv:2405.07813)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError
from polytask.merging.base import PerExpert, Place, TaskVectorMerger, chunks, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "consensus",
    family="merging",
    paper="arXiv:2405.07813",
    needs="base",
    aliases=("consensus_ta", "tall_masks"),
    invariances=("permutation", "scale"),
    exempt={"copies": "a masked sum of task vectors, not a mean"},
)
class Consensus(TaskVectorMerger):
    r"""Add up task vectors where they matter to at least two experts; selfish and useless entries stay at the base.

    .. math:: m_t = \bigl[\,|\tau_t| \ge \ell_t\, |\textstyle\sum_s \tau_s - \tau_t|\,\bigr], \qquad
        M = \Bigl[\sum_t m_t \ge k\Bigr] \odot \sum_t \tau_t

    Args:
        threshold: :math:`\ell_t`, one number or one an expert; the paper chooses among 0.2, 0.3, ..., 0.6 on validation data.
        agreeing: k.
        scale: factor of the merged task vector, chosen on validation data as in task arithmetic.
        weights: one number for all experts or one each, multiplied to the task vectors.

    Cost: a few passes over the task vectors.
    """

    def __init__(
        self, *, threshold: PerExpert = 0.4, agreeing: int = 2, scale: float = 0.3, weights: PerExpert = 1.0
    ) -> None:
        super().__init__(scale=scale, weights=weights)
        in_range(threshold, "the threshold of consensus", 0, float("inf"), each=True)
        if agreeing < 1:
            raise InputError(f"at least one expert agrees, not {agreeing}")
        self.threshold, self.agreeing = threshold, agreeing

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        limits = D.new_tensor(per_expert(self.threshold, len(D), "threshold"))[:, None]
        merged = torch.empty_like(D[0])
        for where, d in chunks(D):
            total = d.sum(0)
            # an entry that no expert moved matters to none
            matters = (d.abs() >= limits * (total - d).abs()) & (d != 0)
            merged.view(-1)[where] = total.mul_(matters.sum(0) >= self.agreeing)
        return merged

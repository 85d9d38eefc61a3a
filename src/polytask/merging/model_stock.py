"""Model Stock (Jang et al., ECCV 2024, arXiv:2403.19522)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SINGULAR = 1e-6
"""Denominators of the ratio below which the experts cancel out."""


@register(
    "model_stock",
    family="merging",
    paper="arXiv:2403.19522",
    needs="base",
    invariances=("permutation", "copies", "scale"),
)
class ModelStock(TaskVectorMerger):
    r"""Go from the base towards the experts' mean as far as the angle between them says.

    .. math:: M = r\, \frac1T \sum_t \tau_t, \qquad r = \frac{T \cos\theta}{1 + (T - 1) \cos\theta}

    with :math:`\cos\theta` the mean cosine between pairs of task vectors of this tensor. Where they cancel out and r has no value, the base
    stays as it is.

    Args:
        per_row: an angle for each row of a matrix instead of one for the tensor.

    Cost: the T x T cosines and one weighted sum.
    """

    fewest = 2
    scratch = 2.0

    def __init__(self, *, per_row: bool = False, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        self.per_row = per_row

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        T = len(D)
        mean = D.mean(0)
        rows = D.view(T, *((D.shape[1], -1) if self.per_row and D.ndim > 2 else (1, -1)))
        norms = rows.norm(dim=2, keepdim=True)
        rows /= torch.where(norms > 0, norms, 1.0)
        # (sum_t u_t)^2 = sum_t u_t^2 + sum_{s != t} u_s u_t, without writing down pairs
        together = rows.sum(0).square().sum(1)
        alone = (norms > 0).sum(0)[:, 0]
        cosine = ((together - alone) / (T * (T - 1))).clamp(-1, 1)
        below = 1 + (T - 1) * cosine
        ratio = torch.where(below > SINGULAR, T * cosine / below, 0.0)
        return mean.view(rows.shape[1:]).mul_(ratio[:, None]).view(D.shape[1:])

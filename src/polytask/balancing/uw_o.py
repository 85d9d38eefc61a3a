"""UW-O: analytically optimal uncertainty weighting (Kirchdorfer et al., 2024, arXiv:2408.07985)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import LossWeighting
from polytask.registry import register


@register(
    "uw_o",
    family="balancing",
    paper="arXiv:2408.07985",
    needs="losses",
    aliases=("optimal_uncertainty",),
    invariances=("permutation", "scale", "single"),
)
class UWO(LossWeighting):
    r"""Weigh each loss by its inverse, the optimum that uncertainty weighting learns towards.

    .. math:: w_i = \frac{p_i / L_i}{\sum_j p_j / L_j}

    taken at the detached losses; the weights sum to 1.

    Cost: a few operations on K numbers a step. Losses must be positive.
    """

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        positive = losses.detach().clamp_min(torch.finfo(losses.dtype).tiny)
        w = torch.softmax(torch.as_tensor(self.p).to(losses).log() - positive.log(), 0)
        return (w * losses).sum(), w

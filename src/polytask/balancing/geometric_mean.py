"""Geometric loss strategy (Chennupati et al., CVPR workshops 2019, arXiv:1904.08492)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import LossWeighting
from polytask.registry import register


@register(
    "geometric_mean",
    family="balancing",
    paper="arXiv:1904.08492",
    needs="losses",
    aliases=("GLS", "geometric_loss_strategy"),
    invariances=("permutation", "scale", "single"),
)
class GeometricMean(LossWeighting):
    r"""Minimise the geometric mean of the losses.

    .. math:: L = \Bigl(\prod_i L_i^{p_i}\Bigr)^{1/K} = \exp\Bigl(\tfrac1K \sum_i p_i \log L_i\Bigr), \qquad
        w_i = \frac{p_i}{K} \frac{L}{L_i}

    Losses must be positive. Taken through the mean of logarithms, so that no product over- or underflows.

    Cost: a few operations on K numbers.
    """

    takes_logarithms = True

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        positive = losses.clamp_min(torch.finfo(losses.dtype).tiny)
        p = torch.as_tensor(self.p / len(losses)).to(losses)
        total = torch.exp((p * positive.log()).sum())
        return total, (p * total / positive).detach()

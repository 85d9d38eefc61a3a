"""Scale-invariant: the sum of logarithms of the losses (Navon et al., ICML 2022, arXiv:2202.01017, as baseline SI)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import LossWeighting
from polytask.registry import register


@register(
    "scale_invariant",
    family="balancing",
    paper="arXiv:2202.01017",
    needs="losses",
    aliases=("scaleinvls", "SI", "log_sum"),
    invariances=("permutation", "scale"),
)
class ScaleInvariant(LossWeighting):
    r"""Add the logarithms of the losses: no loss counts more for being larger.

    .. math:: L = \sum_i p_i \log L_i, \qquad w_i = p_i / L_i

    Equal weighting with ``log_losses=True``. Losses must be positive.

    Cost: nothing beyond the sum.
    """

    takes_logarithms = True

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        positive = losses.clamp_min(torch.finfo(losses.dtype).tiny)
        p = torch.as_tensor(self.p).to(losses)
        return (p * positive.log()).sum(), (p / positive).detach()

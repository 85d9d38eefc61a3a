"""PCB-Merging: parameter competition balancing (Du et al., NeurIPS 2024, arXiv:2410.02396)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, in_range
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "pcb",
    family="merging",
    paper="arXiv:2410.02396",
    needs="base",
    aliases=("pcb_merging", "parameter_competition_balancing"),
    invariances=("permutation",),
    exempt={
        "copies": "entries that lose the competition are gone for good",
        "scale": "the agreement of experts goes through a tanh of squared entries, as in the authors' code",
    },
)
class PCB(TaskVectorMerger):
    r"""Let entries compete: large ones within an expert, and agreeing ones between experts; average those that win by how well they did.

    .. math:: \beta_t = \exp\bigl(T\, N(|\tau_t|)^2\bigr) \odot \tanh\Bigl(\tau_t \odot \sum_s \tau_s\Bigr), \qquad
        w_t = N\bigl(\max(\beta_t, \theta_t)\bigr), \qquad M = \frac{\sum_t w_t \tau_t}{\sum_t w_t}

    with :math:`N(x) = (x - \min x)/(\max x - \min x)` and :math:`\theta_t` the value that a share :math:`\rho` of the entries of
    :math:`\beta_t` exceeds. Minima, maxima and thresholds are taken in each tensor, which lets the merge stream; the authors take them over
    the whole model, and clip a ten-thousandth of the entries before.

    Args:
        density: :math:`\rho`; the paper searches 0.05 to 0.2.

    Cost: a selection and a few passes over the task vectors; memory for two more of each.
    """

    scratch = 3.0
    scratch_per_expert = 2.0

    def __init__(self, *, density: float = 0.1, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        in_range(density, "the density of pcb", 0, 1, open_low=True)
        self.density = density

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        flat = D.view(len(D), -1)
        if not flat.shape[1]:
            return torch.zeros_like(W0)
        beta = _normalized(flat.abs()).square_().mul_(len(D)).exp_()
        beta *= torch.tanh(flat * flat.sum(0))
        losers = flat.shape[1] - max(1, int(self.density * flat.shape[1]))
        if losers:
            beta = torch.maximum(beta, beta.kthvalue(losers, dim=1, keepdim=True).values)
        w = _normalized(beta)
        total = w.sum(0)
        merged = (w * flat).sum(0) / torch.where(total > 0, total, 1.0)
        return merged.view_as(W0)


def _normalized(x: Float[Tensor, "experts entries"]) -> Float[Tensor, "experts entries"]:
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    # a tensor of one entry, or of equal entries, wins
    return torch.where(high > low, (x - low) / torch.where(high > low, high - low, 1.0), 1.0)

"""RanDeS: randomized delta superposition (Zhou et al., 2025, arXiv:2505.11204)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from polytask.merging.base import Place, as_patterns, in_range
from polytask.merging.masking import KeptApart
from polytask.merging.matching import skipped
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "randes",
    family="merging",
    paper="arXiv:2505.11204",
    needs="base",
    aliases=("RanDeS", "randomized_delta_superposition"),
    invariances=("scale",),
    exempt={
        "permutation": "the model of one expert, told by its position; signs are drawn",
        "copies": "the other experts come in with signs of their own",
        "integers_are_the_base_s": "what is not merged is the expert's own",
    },
    example={"expert": 0},
)
class RanDeS(KeptApart):
    r"""Add task vectors up with random signs of each one's columns; an expert comes back by its own, and the others as noise.

    .. math:: \tau = \sum_s \tau_s C_s, \qquad \hat\tau_t = \lambda\, \tau\, C_t^{-1}
        = \lambda \Bigl(\tau_t + \sum_{s \ne t} \tau_s C_s C_t\Bigr), \qquad C_s = \operatorname{diag}(\pm 1)

    The mean of :math:`\hat\tau_t` over the draws is :math:`\lambda \tau_t`, its variance :math:`\lambda^2 \sum_{s \ne t} \tau_s^2`. Only
    the sum and the seed are kept, whatever the number of experts. Tensors that are not matrices are added up as they are. Signs are the
    paper's transformation of a tensor by itself; layers that change places with one another, which it combines with them, are not here.

    Args:
        scale: :math:`\lambda`.
        layers: patterns of the matrices whose columns get signs; the paper takes those of attention and MLP.
        expert: whose model is unpacked, by name or position; :func:`~polytask.merging.pack` keeps all of them.

    Cost: two passes over the task vectors.
    """

    def __init__(self, *, scale: float = 0.5, layers: str | Sequence[str] = "*", expert: int | None = None) -> None:
        super().__init__(expert=expert)
        in_range(scale, "the scale", float("-inf"), float("inf"))
        self.scale, self.layers = scale, as_patterns(layers)

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        assert self.expert is not None
        tau = self.superposed(D, place)
        return tau.mul_(signs(place, self.expert, tau)) if self.takes(place.name, tau.ndim) else tau

    def superposed(self, D: Float[Tensor, "experts ..."], place: Place) -> Float[Tensor, "..."]:
        r""":math:`\tau` of one tensor; D is not changed."""
        if not self.takes(place.name, D.ndim - 1):
            return D.sum(0)
        total = torch.zeros_like(D[0])
        for t, tau in enumerate(D):
            total.addcmul_(tau, signs(place, t, tau))
        return total

    def takes(self, name: str, axes: int) -> bool:
        """Whether the columns of a tensor with so many axes get signs."""
        return axes == 2 and skipped(name, self.layers)


def signs(place: Place, expert: int, tau: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    """The diagonal of :math:`C_t` at a place, in the dtype of a tensor there."""
    return torch.randint(0, 2, tau.shape[-1:], generator=place.generator(expert)).mul_(2).sub_(1).to(tau.dtype)

"""PBI: penalty-based boundary intersection (Zhang and Li, IEEE TEC 2007)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.ideal import ideal_point
from polytask.registry import register


@register(
    "pbi",
    family="balancing",
    paper="doi:10.1109/TEVC.2007.892759",
    needs="losses",
    aliases=("penalty_based_boundary_intersection",),
    invariances=("permutation", "scale", "single"),
    exempt={"descent": "a loss below the ray of the preference is raised to it: weights may be negative"},
)
class PBI(LossWeighting):
    r"""Move the losses along the ray of the preference, and towards it.

    .. math:: L = d_1 + \theta d_2, \qquad d_1 = \langle f, u\rangle, \quad d_2 = \lVert f - d_1 u\rVert, \quad f = L - z, \quad
        u = p / \lVert p\rVert

    The minimum on a front lies where the losses are in proportion to p, for large :math:`\theta`.

    Args:
        theta: penalty for distance from the ray; 5 is usual.
        ideal: z, the lowest losses thought possible: one number or one a task; 0 by default.

    Cost: a few operations on K numbers.
    """

    def __init__(
        self, *, theta: float = 5.0, ideal: float | Sequence[float] = 0.0, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        self.theta, self.ideal = theta, ideal

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        p = torch.as_tensor(self.p).to(losses)
        u = p / p.norm()
        f = losses.detach() - ideal_point(self, self.ideal, losses)
        d1 = f @ u
        off = f - d1 * u
        d2 = off.norm()
        # on the ray the distance has no derivative: its subgradient 0 keeps moving along the ray
        near = d2 <= 10 * torch.finfo(losses.dtype).eps * f.norm()
        w = u + self.theta * torch.where(near, torch.zeros_like(off), off / torch.where(near, torch.ones_like(d2), d2))
        # the value is d1 + theta d2, its derivative w
        return (w * (losses - losses.detach())).sum() + d1 + self.theta * d2, w

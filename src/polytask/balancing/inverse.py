"""The inverse scalarization: a barrier at the worst losses that are accepted (as in LibMOON, arXiv:2409.02969)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.registry import register

CLOSEST = 1e-3


@register(
    "inverse",
    family="balancing",
    paper="arXiv:2409.02969",
    needs="losses",
    aliases=("invagg", "inverse_barrier"),
    invariances=("permutation", "scale"),
)
class Inverse(LossWeighting):
    r"""Keep every loss away from the worst value that is accepted for it.

    .. math:: L = -\sum_i p_i \log\frac{z_i - L_i}{z_i}

    the logarithm of LibMOON's :math:`\prod_i (z_i - L_i)^{-p_i}`, with the same minima and level sets. A loss beyond
    its z pulls like one a thousandth of z below it.

    Args:
        nadir: z, the worst losses accepted: one number or one a task, in the order bound; when omitted twice the first loss seen
            of each task, or 0 where that is negative.

    Cost: a few operations on K numbers a step. Losses must be positive.
    """

    def __init__(self, *, nadir: float | Sequence[float] | None = None, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.nadir = nadir

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        if isinstance(self.nadir, Sequence) and len(self.nadir) != n_tasks:
            raise InputError(f"inverse has {len(self.nadir)} nadirs for {n_tasks} tasks")
        given = torch.full((n_tasks,), torch.nan, dtype=torch.float64)
        if self.nadir is not None:
            given[:] = torch.as_tensor(self.nadir, dtype=torch.float64)
        return {"nadir": given}

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        z = self.state["nadir"] = self.state["nadir"].to(losses.device)
        rows = rows_of(self.active, len(z), losses.device)
        seen = losses.detach().double()
        z[rows] = torch.where(torch.isnan(z[rows]) & (seen != 0), seen + seen.abs(), z[rows])
        # a loss that was always 0 has no worst value yet, and nowhere to go
        known = torch.isfinite(z[rows])
        nadir, p = torch.where(known, z[rows], 1.0), torch.as_tensor(self.p).to(seen)
        unit = torch.where(nadir > 0, nadir, 1.0)  # a logarithm below 0 may rise to it
        room = torch.maximum(nadir - seen, CLOSEST * unit)
        w = torch.where(known, p / room, 0.0).to(losses)
        # the value is the sum of logarithms, its derivative w
        return (w * (losses - losses.detach())).sum() - (p * (room / unit).log()).sum().to(losses), w

"""STCH: smooth Tchebycheff scalarization (Lin et al., ICML 2024, arXiv:2402.19078)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.epoch_mean import EpochMean
from polytask.balancing.ideal import ideal_point
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.registry import register


@register(
    "stch",
    family="balancing",
    paper="arXiv:2402.19078",
    needs="losses",
    aliases=("smooth_tchebycheff", "SmoothTche", "STCHScalarizer"),
    invariances=("permutation", "scale"),
)
class STCH(LossWeighting):
    r"""Minimise a smooth maximum of the losses, each measured by where it stood early in training.

    .. math:: L = K \mu \log \sum_i \exp\frac{v_i (f_i - z_i)}{\mu}, \qquad f_i = \log\frac{L_i}{\bar L_i}

    with :math:`v = p`, or :math:`v = 1/p` in the modified form, whose solution lies where the f are in proportion to p.
    :math:`\bar L` (the nadir) is the mean loss of the epoch of index ``warmup``; up to its end
    :math:`\sum_i p_i \log L_i` is minimised. Epochs are counted by ``begin_epoch()``. With ``warmup=None`` the losses
    themselves are compared, :math:`f_i = L_i`, from the first step on. As :math:`\mu \to 0` this becomes K times the
    largest :math:`v_i (f_i - z_i)`.

    Args:
        mu: smoothness, in units of f; small values approach the maximum.
        warmup: epoch whose mean losses become the nadir, or None for no normalisation.
        modified: divide by p instead of multiplying.
        ideal: z, the lowest f thought possible: one number or one a task; 0 by default.

    Cost: a few operations on K numbers.
    """

    takes_logarithms = True

    def __init__(
        self,
        *,
        mu: float = 1.0,
        warmup: int | None = 4,
        modified: bool = False,
        ideal: float | Sequence[float] = 0.0,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if warmup is None and self.log_losses:
            raise InputError("stch with warmup=None compares the losses as they are: it has no log_losses")
        if not mu > 0:
            raise InputError(f"the smoothness mu of stch is positive, not {mu}")
        self.mu, self.warmup, self.modified, self.ideal = mu, warmup, modified, ideal
        self.running = EpochMean()

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**self.running.start(n_tasks), "nadir": torch.full((n_tasks,), torch.nan, dtype=torch.float32)}

    def begin_epoch(self) -> None:
        mean = self.running.end(self.state)
        if mean is not None and self.state["epoch"] - 1 == self.warmup:
            self.state["nadir"] = mean

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["nadir"]), losses.device)
        self.running.add(self.state, rows, losses)
        p = torch.as_tensor(self.p).to(losses)
        positive = losses.clamp_min(torch.finfo(losses.dtype).tiny)
        if self.warmup is not None and self.state["epoch"] <= self.warmup:
            return (p * positive.log()).sum(), (p / positive).detach()
        f = losses
        if self.warmup is not None:
            nadir = self.state["nadir"].to(losses)[rows]
            # a task that the nadir epoch lacked is measured by its present loss
            f = torch.log(positive / torch.where(torch.isnan(nadir), positive.detach(), nadir))
        f = f - ideal_point(self, self.ideal, losses)
        v = 1 / p if self.modified else p
        total = len(losses) * self.mu * torch.logsumexp(v * f / self.mu, 0)
        slope = 1.0 if self.warmup is None else 1.0 / positive.detach()
        return total, len(losses) * torch.softmax(v * f.detach() / self.mu, 0) * v * slope

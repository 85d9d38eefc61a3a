"""The mean loss of each task over an epoch, gathered without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class EpochMean:
    """Running sums kept in ``state[name + "_sum"]`` and ``state[name + "_count"]``.

    Args:
        name: what the sums are called in the state.
    """

    def __init__(self, name: str) -> None:
        self.sum, self.count = f"{name}_sum", f"{name}_count"

    def start(self, n_tasks: int) -> dict[str, Tensor]:
        """The state of an epoch without any step."""
        return {self.sum: torch.zeros(n_tasks), self.count: torch.zeros(n_tasks)}

    def started(self, state: dict[str, Any]) -> bool:
        """Whether the epoch has seen a step."""
        return bool(state[self.count].any())

    def add(self, state: dict[str, Any], active: Tensor, losses: Float[Tensor, " active"]) -> None:
        """Count the losses of the active tasks."""
        for key in (self.sum, self.count):
            if state[key].device != losses.device:
                state[key] = state[key].to(losses.device)
        state[self.sum][active] += losses.float()
        state[self.count][active] += 1

    def finish(self, state: dict[str, Any]) -> Float[Tensor, " tasks"]:
        """The means of the epoch, NaN for a task never seen; the sums start again from 0."""
        mean: Tensor = state[self.sum] / state[self.count]
        state[self.sum], state[self.count] = torch.zeros_like(mean), torch.zeros_like(mean)
        return mean

"""The mean loss of each task over an epoch, gathered without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.rows import Rows


class EpochMean:
    """Running sums in ``state["epoch_sum"]`` and ``state["epoch_count"]``; ``state["epoch"]`` counts the epochs that ended.

    An epoch without any step is none: whether the first one is announced before the tasks are known makes no
    difference.
    """

    def start(self, n_tasks: int) -> dict[str, Any]:
        """The state before the first epoch."""
        return {
            "epoch_sum": torch.zeros(n_tasks, dtype=torch.float32),
            "epoch_count": torch.zeros(n_tasks, dtype=torch.float32),
            "epoch": 0,
            "epoch_begun": False,
        }

    def add(self, state: dict[str, Any], rows: Rows, losses: Float[Tensor, " rows"]) -> None:
        """Count the losses of the given tasks."""
        for key in ("epoch_sum", "epoch_count"):
            if state[key].device != losses.device:
                state[key] = state[key].to(losses.device)
        state["epoch_sum"][rows] += losses.detach()
        state["epoch_count"][rows] += 1
        state["epoch_begun"] = True

    def end(self, state: dict[str, Any]) -> Float[Tensor, " tasks"] | None:
        """The means of the epoch that ends, NaN for a task never seen, or None where no step was taken; sums start anew."""
        if not state.get("epoch_begun"):
            return None
        mean: Tensor = state["epoch_sum"] / state["epoch_count"]
        state["epoch_sum"], state["epoch_count"] = torch.zeros_like(mean), torch.zeros_like(mean)
        state["epoch"] += 1
        state["epoch_begun"] = False
        return mean

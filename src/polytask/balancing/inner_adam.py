"""A few numbers a task, learnt by an Adam of their own whose moments belong to the balancer's state."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.rows import Rows

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class InnerAdam:
    """Adam on one number a task, kept in ``state[name]``, ``state[name + "_mean"]``, ``..._square`` and ``..._steps``.

    Each task counts its own steps, so that a task absent from a batch keeps everything it has.

    Args:
        name: what the numbers are called in the state.
        lr: step size.
        weight_decay: added to the gradient, times the number, as in Kingma and Ba's formulation with an L2 penalty.

    Source: Kingma and Ba, ICLR 2015 (arXiv:1412.6980).
    """

    def __init__(self, name: str, lr: float, weight_decay: float = 0.0) -> None:
        self.name, self.lr, self.weight_decay = name, lr, weight_decay
        self.keys = (name, f"{name}_mean", f"{name}_square", f"{name}_steps")

    def start(self, n_tasks: int, value: float) -> dict[str, Tensor]:
        """The state before the first step."""
        numbers = (value, 0.0, 0.0, 0.0)
        return {
            key: torch.full((n_tasks,), number, dtype=torch.float32)
            for key, number in zip(self.keys, numbers, strict=True)
        }

    def read(self, state: dict[str, Any], rows: Rows, device: torch.device) -> Float[Tensor, " rows"]:
        """A copy of the numbers of the given tasks, float32."""
        number: Tensor = self._on(state, self.name, device)[rows]
        return number.clone()

    def step(self, state: dict[str, Any], rows: Rows, gradient: Float[Tensor, " rows"]) -> None:
        """One descent step for the given tasks."""
        x, m, v, t = parts = [self._on(state, key, gradient.device)[rows] for key in self.keys]
        g = gradient.float()
        if self.weight_decay:
            g = g + self.weight_decay * x
        t += 1
        m.lerp_(g, 1 - BETA1)
        v.lerp_(g * g, 1 - BETA2)
        root = (v / (1 - BETA2**t)).sqrt_().add_(EPSILON)
        x.sub_(self.lr * (m / (1 - BETA1**t)) / root)
        if not isinstance(rows, slice):  # the parts are copies, not views
            for key, part in zip(self.keys, parts, strict=True):
                state[key][rows] = part

    @staticmethod
    def _on(state: dict[str, Any], key: str, device: torch.device) -> Tensor:
        tensor: Tensor = state[key]
        if tensor.device != device:
            tensor = state[key] = tensor.to(device)
        return tensor

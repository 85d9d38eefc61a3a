"""A few numbers a task, learnt by an Adam of their own whose moments belong to the balancer's state."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

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

    def start(self, n_tasks: int, value: float) -> dict[str, Tensor]:
        """The state before the first step."""
        zeros = torch.zeros(n_tasks)
        return {
            self.name: torch.full((n_tasks,), value),
            f"{self.name}_mean": zeros.clone(),
            f"{self.name}_square": zeros.clone(),
            f"{self.name}_steps": zeros.clone(),
        }

    def read(self, state: dict[str, Any], active: Tensor) -> Float[Tensor, " active"]:
        """The numbers of the active tasks, float32, on the device of ``active``."""
        return self._on(state, self.name, active.device)[active]

    def step(self, state: dict[str, Any], active: Tensor, gradient: Float[Tensor, " active"]) -> None:
        """One descent step for the active tasks."""
        x, m, v, t = (self._on(state, self.name + part, active.device) for part in ("", "_mean", "_square", "_steps"))
        g = gradient.float() + self.weight_decay * x[active]
        t[active] += 1
        m[active] = BETA1 * m[active] + (1 - BETA1) * g
        v[active] = BETA2 * v[active] + (1 - BETA2) * g * g
        mean = m[active] / (1 - BETA1 ** t[active])
        square = v[active] / (1 - BETA2 ** t[active])
        x[active] -= self.lr * mean / (square.sqrt() + EPSILON)

    @staticmethod
    def _on(state: dict[str, Any], key: str, device: torch.device) -> Tensor:
        tensor: Tensor = state[key]
        if tensor.device != device:
            tensor = state[key] = tensor.to(device)
        return tensor

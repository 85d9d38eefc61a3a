"""A shared representation handed to several heads, whose backward sees the gradient of every task apart.

Plain autograd adds the gradients of all heads where they meet. :class:`FanOut` gives every head a view of its own instead, so that **one**
backward pass of the sum of losses brings all K representation gradients to one place, where a combination of them is chosen and passed on to the
trunk. Every parameter still receives its gradient once, through the ordinary hooks: distributed wrappers, gradient scalers, compiled trunks and
activation checkpoints notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Combine = Callable[[dict[str, Tensor]], Tensor]


class FanOut:
    """The meeting point of the heads on one shared representation during one forward pass.

    Attributes:
        tensor: the representation z, shape (batch, ...).
        copies: one view of z a task; each task's head must read its own.
        combine: set by the engine before the backward pass: maps {task: dL_task/dz} (absent tasks left out) to the gradient passed on to
            the trunk, of z's shape. None adds them up, which is plain autograd.
    """

    def __init__(self, tensor: Float[Tensor, "batch *shape"], tasks: Sequence[str]) -> None:
        self.tensor = tensor
        self.tasks = tuple(tasks)
        self.combine: Combine | None = None
        views = _Split.apply(tensor, self) if tensor.requires_grad else (tensor,) * len(self.tasks)
        self.copies: dict[str, Tensor] = dict(zip(self.tasks, views, strict=True))

    def merge(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient passed on to the trunk, given the gradient of each view (None for a task without loss in this pass)."""
        present = {n: g for n, g in zip(self.tasks, gradients, strict=True) if g is not None}
        if not present:
            return None
        if self.combine is not None:
            return self.combine(present)
        return torch.stack(list(present.values())).sum(0) if len(present) > 1 else next(iter(present.values()))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, port: FanOut) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.port = port
        return tuple(z.view_as(z) for _ in port.tasks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.port.merge(gradients), None

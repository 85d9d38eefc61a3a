"""GradDrop: gradient sign dropout (Chen et al., NeurIPS 2020, arXiv:2010.06808)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import DenseGradients, TaskGradients
from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.errors import InputError
from polytask.registry import register


@register(
    "graddrop",
    family="balancing",
    paper="arXiv:2010.06808",
    needs="jacobian",
    aliases=("gradient_sign_dropout",),
    invariances=("permutation", "scale", "single"),
)
class GradDrop(GradientAggregator):
    r"""Let each coordinate keep only its positive or only its negative gradients, drawn by their weight.

    .. math:: P = \tfrac12 \Bigl(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\Bigr), \quad U \sim \mathrm{Uniform}(0, 1), \qquad
        d = \sum_i \bigl(\ell_i + (1 - \ell_i)\,[g_i > 0 \wedge P > U \;\text{or}\; g_i < 0 \wedge P < U]\bigr)\, g_i

    elementwise, with each gradient multiplied by its preference before.

    Args:
        leak: :math:`\ell`, how much of each task's gradient passes anyway: one number, or one a task in the order
            bound; 0 by default.

    Cost: two passes over the K x P numbers, or two products for scalar linear heads, and P random numbers a step.
    """

    def __init__(self, *, leak: float | Sequence[float] = 0.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        values = [leak] if isinstance(leak, int | float) else list(leak)
        if not values or not all(0 <= v <= 1 for v in values):
            raise InputError(f"the leak of graddrop lies between 0 and 1, not {leak}")
        self.leak = leak

    def aggregate(
        self,
        J: Float[Tensor, "tasks coordinates"],
        losses: Float[Tensor, " tasks"] | None,  # noqa: ARG002
    ) -> Float[Tensor, " coordinates"]:
        return self._drop(DenseGradients(J))

    def direction_at(
        self, gradients: TaskGradients, scale: float, losses: Float[Tensor, " tasks"] | None
    ) -> Float[Tensor, " coordinates"]:
        return super().direction_at(gradients, scale, losses) if self.every > 1 else self._drop(gradients)

    def _drop(self, gradients: TaskGradients) -> Float[Tensor, " coordinates"]:
        p, leak = torch.as_tensor(self.p), torch.as_tensor(self._leak())
        # a generator of the device, seeded from the one that state_dict keeps
        seed, generator, found = int(self.rng.integers(2**62)), None, []
        without = gradients.pulls(p * (1 - leak)) if leak.any() else itertools.repeat(None)
        for (total, size), rest in zip(gradients.pulls(p), without, strict=False):
            generator = generator or torch.Generator(total.device).manual_seed(seed)
            # P > U where total > V size, V = 2U - 1; what is kept is (total + size) / 2 there, (total - size) / 2 elsewhere
            # drawn in one type, whatever that of the gradients: the same signs are kept
            draws = torch.empty_like(size, dtype=torch.float32).uniform_(-1, 1, generator=generator)
            turn = draws.to(size.dtype).mul_(size).sub_(total)
            kept, size = rest or (total, size)
            found.append(size.copysign_(turn).add_(kept).mul_(-0.5).add_(total))
        return torch.cat(found).to(gradients.dtype)

    def _leak(self) -> list[float]:
        if isinstance(self.leak, int | float):
            return [float(self.leak)] * len(self.active)
        assert self.tasks is not None
        if len(self.leak) != len(self.tasks):
            raise InputError(f"graddrop has {len(self.leak)} leaks for {len(self.tasks)} tasks")
        return [float(self.leak[i]) for i in self.active]

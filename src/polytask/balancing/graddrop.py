"""GradDrop: gradient sign dropout (Chen et al., NeurIPS 2020, arXiv:2010.06808)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.errors import InputError
from polytask.registry import register

# numbers looked at in one go: what is made of them stays in the cache
SCRATCH = 2**18


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

    Cost: a few passes over the K x P numbers and P random ones a step.
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
        if self.preference is not None:
            J = J * torch.as_tensor(self.p).to(J)[:, None]
        # a generator of the device, seeded from the one that state_dict keeps
        generator = torch.Generator(J.device).manual_seed(int(self.rng.integers(2**62)))
        U = torch.rand(J.shape[1], generator=generator, device=J.device)
        leak = self._leak(J)
        d = torch.empty_like(J[0])
        width = max(1, SCRATCH // len(J))
        for g, u, out in zip(*(torch.split(t, width, -1) for t in (J, U, d)), strict=True):
            out.copy_(_kept(g, u, leak))
        return d

    def _leak(self, J: Tensor) -> Tensor | None:
        if isinstance(self.leak, int | float):
            return None if self.leak == 0 else J.new_full((len(J), 1), float(self.leak))
        assert self.tasks is not None
        if len(self.leak) != len(self.tasks):
            raise InputError(f"graddrop has {len(self.leak)} leaks for {len(self.tasks)} tasks")
        return J.new_tensor([self.leak[i] for i in self.active])[:, None]


def _kept(g: Tensor, U: Tensor, leak: Tensor | None) -> Tensor:
    exact = g if g.dtype == torch.float64 else g.float()
    up, down = exact.clamp_min(0), exact.clamp_max(0)
    positive, negative = up.sum(0), down.sum(0)
    chosen = positive > U * (positive - negative)  # P > U, P being the positive part of the whole
    if leak is None:
        return torch.where(chosen, positive, negative)
    return torch.where(chosen, up + leak * down, down + leak * up).sum(0)

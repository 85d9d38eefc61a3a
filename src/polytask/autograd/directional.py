"""How fast every loss changes along one direction in parameter space, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from polytask.errors import InputError

Losses = Mapping[str, Float[Tensor, ""]]


def directional_derivatives(
    module: nn.Module, losses: Callable[[Any], Losses], direction: Mapping[str, Tensor] | None = None
) -> dict[str, Float[Tensor, ""]]:
    r"""Derivatives :math:`\langle \nabla L_k, d\rangle = \frac{\mathrm d}{\mathrm d\epsilon} L_k(\theta + \epsilon d)` of all losses.

    A positive one says that a small step along d makes the task worse. Forward-mode differentiation carries d through one pass of the
    model: no graph is kept, whatever the number of tasks.

    Args:
        module: the model with parameters :math:`\theta`. Neither they, nor ``.grad``, nor buffers change; a pass in training mode draws
            random numbers as any other.
        losses: the module -> {task: scalar}, for instance ``lambda m: tasks.losses(m(inputs), targets)``.
        direction: {parameter name: tensor of its shape}, zero for those left out. When omitted d is minus ``.grad``, the direction of
            a plain gradient step, so that the result is each loss's change per unit of learning rate.

    Returns:
        {task: derivative}, in units of the loss per unit of :math:`\epsilon`.

    Raises:
        InputError: a name or a shape that is no parameter's, no direction at all, or an operation that torch cannot differentiate in
            forward mode.

    Cost: about two forward passes.
    """
    parameters = dict(module.named_parameters())
    if direction is None:
        direction = {n: -p.grad for n, p in parameters.items() if p.grad is not None}
    if not direction:
        raise InputError("there is no direction: no parameter has a gradient, and none was given")
    for name, d in direction.items():
        if name not in parameters:
            raise InputError(f"the direction names {name!r}, which is no parameter of the model")
        if d.shape != parameters[name].shape:
            raise InputError(
                f"the direction of {name!r} has shape {tuple(d.shape)} instead of {tuple(parameters[name].shape)}"
            )
    # without recording: the ports of shared representations, which know backward passes only, are then plain tensors
    with torch.no_grad(), forward_ad.dual_level():
        held: dict[str, Tensor] = {f"module.{n}": b.clone() for n, b in module.named_buffers()}
        for n, p in parameters.items():
            held[f"module.{n}"] = (
                cast(Any, forward_ad.make_dual)(p.detach(), direction[n].to(p)) if n in direction else p.detach()
            )
        try:
            found = torch.func.functional_call(_Applied(module), held, (losses,))
        except NotImplementedError as error:
            raise InputError(f"the model cannot be differentiated in forward mode: {error}") from error
        slopes = {n: cast(Any, forward_ad.unpack_dual)(loss) for n, loss in found.items()}
        return {
            n: torch.zeros_like(s.primal) if s.tangent is None else s.tangent.detach().clone()
            for n, s in slopes.items()
        }


class _Applied(nn.Module):
    """Calls a function of a module while the module holds other parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Losses]) -> Losses:
        return function(self.module)

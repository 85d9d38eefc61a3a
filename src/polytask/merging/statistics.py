"""What some methods must know of each expert beside its weights, gathered once on a few inputs and streamed in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from polytask.errors import InputError


@torch.no_grad()
def gather_gramians(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    r"""The Gramian :math:`X^\top X` of the inputs of every linear layer.

    Args:
        model: an expert; it is put into evaluation mode while it runs.
        batches: inputs; a tuple is unpacked into positional arguments, a dict into keyword arguments.

    Returns:
        {name of the layer's weight: Gramian, shape (inputs, inputs), float64}.

    Raises:
        InputError: no batch.

    Cost: one forward pass a batch, rows n^2 multiplications a layer, and memory for the Gramians only.
    """
    gramians: dict[str, Tensor] = {}

    def watch(weight: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            X = inputs[0].reshape(-1, inputs[0].shape[-1]).to("cpu", torch.float64)
            if weight not in gramians:
                gramians[weight] = X.new_zeros(X.shape[1], X.shape[1])
            gramians[weight].addmm_(X.T, X)

        return see

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight" if name else "weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            _forward(model, batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not gramians:
        raise InputError("no Gramian was gathered: there was no batch, or the model has no linear layer")
    return gramians


def gather_fisher(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    r"""The diagonal of the Fisher information of a classifier, expected under its own predictions.

    .. math:: F = \frac1N \sum_{x} \sum_y p(y \mid x)\, \bigl(\nabla \log p(y \mid x)\bigr)^2

    Args:
        model: an expert whose output is logits, shape (examples, classes); it is put into evaluation mode while it runs.
        batches: inputs; a tuple is unpacked into positional arguments, a dict into keyword arguments.

    Returns:
        {name of the parameter: diagonal, the parameter's shape, float64}.

    Raises:
        InputError: no batch.

    Cost: one backward pass an example and class.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fisher = {n: torch.zeros_like(p, dtype=torch.float64, device="cpu") for n, p in parameters.items()}
    examples, training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            log_p = _forward(model, batch).log_softmax(-1)
            examples += len(log_p)
            for row in log_p:
                for y, value in enumerate(row):
                    gradients = torch.autograd.grad(
                        value, list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    for total, g in zip(fisher.values(), gradients, strict=True):
                        if g is not None:
                            total += float(row[y].detach().exp()) * g.to("cpu", torch.float64).square()
    finally:
        model.train(training)
    if not examples:
        raise InputError("no Fisher information was gathered: there was no batch")
    return {n: total / examples for n, total in fisher.items()}


def _forward(model: nn.Module, batch: Any) -> Tensor:
    positional = batch if isinstance(batch, tuple | list) else (batch,)
    output = model(**batch) if isinstance(batch, dict) else model(*positional)
    # transformers' models wrap their logits
    logits: Tensor = getattr(output, "logits", output)
    return logits

r"""What some methods must know of each expert beside its weights, gathered once on a few inputs and streamed in float64.

The statistic of a linear layer is the Gramian :math:`S = [X\; 1]^\top [X\; 1]` of its inputs with a column of ones appended: one tensor
that holds :math:`X^\top X`, the sum of the inputs and how many there were. :mod:`polytask.merging.moments` reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from polytask.errors import InputError
from polytask.merging.base import TURNED


def gather(statistic: str, model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """A statistic by its name, ``gramian`` or ``fisher``."""
    return gather_gramians(model, batches) if statistic == "gramian" else gather_fisher(model, batches)


@torch.no_grad()
def holding(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights, whose shapes may differ, as those of task heads do."""
    filled = deepcopy(model)
    for name, tensor in filled.state_dict(keep_vars=True).items():
        if name in state:
            tensor.data = state[name].detach().clone()
    return filled


@torch.no_grad()
def gather_gramians(model: nn.Module, batches: Iterable[Any], only: Collection[str] | None = None) -> dict[str, Tensor]:
    r"""The Gramian :math:`[X\; 1]^\top [X\; 1]` of the inputs of every linear layer.

    Linear layers are ``nn.Linear``, GPT-2's ``Conv1D`` and both projections of ``nn.MultiheadAttention``: its stacked
    ``in_proj_weight``, whose inputs are queries, keys and values (once where they are one tensor), and its ``out_proj``. A weight shared
    by several layers has one Gramian of all their inputs, under its first name; one that is an embedding's as well has none. Padding,
    where a batch's ``attention_mask`` (examples, tokens) is zero, does not count.

    Args:
        model: an expert; it is put into evaluation mode while it runs.
        batches: inputs; a tuple is unpacked into positional arguments, a dict into keyword arguments.
        only: names of the weights that matter; all when omitted.

    Returns:
        {name of the layer's weight in the state dict: Gramian, shape (inputs + 1, inputs + 1), float64}; ``.T`` stands behind the name
        where the layer keeps the weight as (inputs, outputs).

    Raises:
        InputError: no batch.

    Cost: one forward pass a batch (attention is computed twice), rows n^2 multiplications a layer, and memory for the Gramians only.
    """
    gathering = _Gathering(model, only)
    handles = gathering.attach()
    try:
        with _evaluating(model):
            for batch in batches:
                gathering.masks = _masks(batch)
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not gathering.gramians:
        raise InputError("no Gramian was gathered: there was no batch for the model, or it has no linear layer")
    return gathering.gramians


class _Gathering:
    """Hooks on a model's linear layers, and what they have seen."""

    def __init__(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        self.model, self.only = model, only
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.gramians: dict[str, Tensor] = {}
        self.masks: list[Tensor] = []
        self.within_attention = False

    def attach(self) -> list[RemovableHandle]:
        handles = []
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(self._linear))
            elif type(module).__name__ == "Conv1D":
                handles.append(module.register_forward_pre_hook(self._turned))
            elif isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_pre_hook(self._attention, with_kwargs=True))
        return handles

    def see(self, weight: Tensor, inputs: Tensor, suffix: str = "") -> None:
        if id(weight) in self.embeddings or (self.only is not None and self.names[id(weight)] not in self.only):
            return
        X = self._unpadded(inputs).to("cpu", torch.float64)
        S = self.gramians.setdefault(
            self.names[id(weight)] + suffix, torch.zeros(X.shape[1] + 1, X.shape[1] + 1, dtype=torch.float64)
        )
        S[:-1, :-1].addmm_(X.T, X)
        total = X.sum(0)
        S[:-1, -1] += total
        S[-1, :-1] += total
        S[-1, -1] += len(X)

    def _unpadded(self, inputs: Tensor) -> Tensor:
        X, places = inputs.reshape(-1, inputs.shape[-1]), tuple(inputs.shape[:-1])
        for mask in self.masks:
            # layers see (examples, tokens, d), the same transposed, or flattened; pooled inputs have no tokens to drop
            for laid in (mask, mask.T, mask.flatten()):
                if places == tuple(laid.shape):
                    return X[laid.flatten()]
        return X

    def _linear(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        self.see(module.weight, inputs[0])

    def _turned(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module.weight, Tensor)
        self.see(module.weight, inputs[0], TURNED)

    def _attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        if self.within_attention:
            return
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        stacked = [given[role] for role in ("query", "key", "value")]
        # rows of a sequence-first layer are laid out as the mask is
        turned = [x if module.batch_first or x.ndim < 3 else x.transpose(0, 1) for x in stacked]
        if module.in_proj_weight is not None:
            for i in {id(x): i for i, x in enumerate(stacked)}.values():
                self.see(module.in_proj_weight, turned[i])
        else:
            for weight, x in zip(
                (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight), turned, strict=True
            ):
                self.see(weight, x)
        heads = self._heads(module, args, kwargs)
        self.see(module.out_proj.weight, heads if module.batch_first or heads.ndim < 3 else heads.transpose(0, 1))

    def _heads(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What goes into the output projection: the output where that projection is the identity."""
        weight, bias = module.out_proj.weight, module.out_proj.bias
        replaced = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        if bias is not None:
            replaced["out_proj.bias"] = torch.zeros_like(bias)
        self.within_attention = True
        try:
            heads: Tensor = functional_call(module, replaced, args, kwargs)[0]
        finally:
            self.within_attention = False
        return heads


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no fused attention: it bypasses the hooks of the layers within."""
    training, fused = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        model.train(training)


def _masks(batch: Any) -> list[Tensor]:
    named: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    return [
        m.bool() for n, m in named.items() if n.endswith("attention_mask") and isinstance(m, Tensor) and m.ndim == 2
    ]


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
    examples = 0
    with _evaluating(model):
        for batch in batches:
            logits = forward(model, batch)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(
                    f"Fisher information is that of a classifier with logits (examples, classes), not {shape}"
                )
            log_p = logits.log_softmax(-1)
            examples += len(log_p)
            for row in log_p:
                for y, value in enumerate(row):
                    gradients = torch.autograd.grad(
                        value, list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    for total, g in zip(fisher.values(), gradients, strict=True):
                        if g is not None:
                            total += float(row[y].detach().exp()) * g.to("cpu", torch.float64).square()
    if not examples:
        raise InputError("no Fisher information was gathered: there was no batch")
    return {n: total / examples for n, total in fisher.items()}


def forward(model: nn.Module, batch: Any) -> Tensor:
    """The output of a model on a batch: a tuple is unpacked into positional arguments, a dict into keyword arguments."""
    positional = batch if isinstance(batch, tuple | list) else (batch,)
    output = model(**batch) if isinstance(batch, dict) else model(*positional)
    # transformers' models wrap their logits
    logits: Tensor = getattr(output, "logits", output)
    return logits

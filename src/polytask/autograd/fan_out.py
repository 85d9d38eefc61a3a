"""A shared representation handed to several heads, whose backward sees the gradient of every task apart.

Plain autograd adds the gradients of all heads where they meet. A :class:`FanOut` keeps them apart until they are
together at one :class:`Junction`, inside **one** backward pass of the sum of losses; there a combination of them is chosen and
passed on to the trunk. Every parameter still receives its gradient once, through the ordinary hooks: distributed
wrappers, gradient scalers, compiled trunks and activation checkpoints notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without its second of imports
from torch.nn import functional as F

from polytask.autograd.task_gradients import DenseGradients, LinearGradients, TaskGradients
from polytask.autograd.workspace import Workspace

Select = Callable[[Sequence[str]], TaskGradients]
Combine = Callable[[frozenset[str], Select], Tensor]


class Junction:
    """What the backward pass finds where the gradients of the heads meet.

    It holds no tensor of the graph: the graph holds it, and a cycle through the graph is one that no garbage collector sees.

    Attributes:
        tasks: the tasks whose heads meet here, in order.
        bias: for linear heads run as one product, which of them have a bias; else empty.
        combine: set by the engine before the backward pass. It is told which tasks have a gradient here and given a function from
            an order of them to their :class:`TaskGradients`, and returns the gradient for the trunk. None adds them up.
        workspace: where rows are written, lent by the engine together with ``combine``.
    """

    def __init__(self, tasks: Iterable[str], bias: Iterable[bool] = ()) -> None:
        self.tasks = tuple(tasks)
        self.bias = tuple(bias)
        self.combine: Combine | None = None
        self.workspace: Workspace | None = None

    def inputs_of(self, k: int) -> tuple[int, ...]:
        """Which inputs of the joint product (z, the weights, the biases) the k-th output of linear heads depends on."""
        return (0, 1 + k, 1 + len(self.tasks) + sum(self.bias[:k])) if self.bias[k] else (0, 1 + k)


class FanOut:
    """A shared representation and the heads that read it, during one forward pass.

    Attributes:
        tensor: the representation z, shape (batch, ...).
        junction: where the gradients of the heads meet.
    """

    def __init__(self, tensor: Float[Tensor, "batch *shape"], junction: Junction) -> None:
        self.tensor = tensor
        self.junction = junction


class Copies(FanOut):
    """One view of the representation for each head, whatever the heads are.

    Attributes:
        copies: {task: view of z}; each task's head must read its own.
    """

    @_disable_dynamo  # a compiled graph would keep the junction as it was when traced
    def __init__(self, tensor: Float[Tensor, "batch *shape"], tasks: Iterable[str]) -> None:
        super().__init__(tensor, Junction(tasks))
        names = self.junction.tasks
        views: tuple[Tensor, ...] = (tensor,) * len(names)
        if tensor.requires_grad:
            views = _Split.apply(tensor, self.junction)  # type: ignore[no-untyped-call]
        self.copies: dict[str, Tensor] = dict(zip(names, views, strict=True))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, junction: Junction) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.junction = junction
        return tuple(z.view_as(z) for _ in junction.tasks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        junction: Junction = ctx.junction
        present = {n: g for n, g in zip(junction.tasks, gradients, strict=True) if g is not None}
        if not present:
            return None, None
        if junction.combine is None:
            return _total(present.values()), None
        memory = junction.workspace or Workspace()
        shape = next(iter(present.values())).shape

        def select(names: Sequence[str]) -> TaskGradients:
            return DenseGradients(memory.stack([present[n] for n in names]))

        return junction.combine(frozenset(present), select).view(shape), None


class LinearHeads(FanOut):
    """All heads are linear: they run as one matrix product, and their gradients at z stay factored.

    Attributes:
        outputs: {task: (batch, ..., outputs of the task)}.
    """

    @_disable_dynamo
    def __init__(self, tensor: Float[Tensor, "batch *shape"], heads: Mapping[str, nn.Linear]) -> None:
        super().__init__(tensor, Junction(heads, (h.bias is not None for h in heads.values())))
        weights = [h.weight for h in heads.values()]
        biases = [h.bias for h in heads.values() if h.bias is not None]
        outputs = _Joined.apply(tensor, *weights, *biases, self.junction)  # type: ignore[no-untyped-call]
        self.outputs: dict[str, Tensor] = dict(zip(heads, outputs, strict=True))

    @staticmethod
    def fits(heads: Iterable[nn.Module]) -> bool:
        """Whether these heads can run as one product: plain ``nn.Linear`` without hooks."""
        return all(type(h) is nn.Linear and not h._forward_hooks and not h._forward_pre_hooks for h in heads)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *parameters, junction = arguments
        weights, rest = parameters[: len(junction.tasks)], parameters[len(junction.tasks) :]
        biases = [rest.pop(0) if has else w.new_zeros(len(w)) for w, has in zip(weights, junction.bias, strict=True)]
        ctx.save_for_backward(z, *weights)
        ctx.set_materialize_grads(False)
        ctx.junction = junction
        joined = F.linear(z, torch.cat(weights), torch.cat(biases))
        return tuple(torch.unsafe_split_with_sizes(joined, [len(w) for w in weights], dim=-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        z, *weights = ctx.saved_tensors
        junction: Junction = ctx.junction
        n_arguments = len(weights) + sum(junction.bias) + 2
        present = [k for k, g in enumerate(gradients) if g is not None]
        if not present:
            return (None,) * n_arguments
        W = torch.cat([weights[k] for k in present])
        D = torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients if g is not None], dim=1).to(W.dtype)
        sizes = [len(weights[k]) for k in present]
        found: list[Tensor | None] = [None] * n_arguments
        dW = torch.split(D.T @ z.reshape(-1, z.shape[-1]).to(W.dtype), sizes)
        for k, dw, db in zip(present, dW, torch.split(D.sum(0), sizes), strict=True):
            for place, g in zip(junction.inputs_of(k)[1:], (dw, db), strict=False):
                found[place] = g
        if ctx.needs_input_grad[0]:
            ends = accumulate(sizes)
            names = [junction.tasks[k] for k in present]
            columns = {n: slice(end - size, end) for n, end, size in zip(names, ends, sizes, strict=True)}
            dz = (
                D @ W
                if junction.combine is None
                else junction.combine(frozenset(columns), _factored(D, W, columns, junction.workspace))
            )
            found[0] = dz.view(z.shape).to(z.dtype)
        return tuple(found)


def _factored(D: Tensor, W: Tensor, columns: Mapping[str, slice], workspace: Workspace | None) -> Select:
    return lambda names: LinearGradients(D, W, [columns[n] for n in names], workspace)


def _total(gradients: Iterable[Tensor]) -> Tensor:
    first, *others = gradients
    if not others:
        return first
    result = first + others[0]
    for g in others[1:]:
        result += g
    return result

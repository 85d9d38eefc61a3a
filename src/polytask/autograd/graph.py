"""Looking at an autograd graph: which leaf tensors does a loss reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def leaves(output: Tensor, stop_at: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaf tensors that ``output`` depends on, in a fixed order, without walking past ``stop_at``.

    Args:
        output: a tensor with graph.
        stop_at: tensors whose own inputs are not followed; a leaf among them is left out.

    Returns:
        Leaves that require gradients, each once. Cost: one visit a node of the graph, on the host.
    """
    barrier = {t.grad_fn for t in stop_at if t.grad_fn is not None}
    excluded = {id(t) for t in stop_at}
    if output.grad_fn is None:
        return [output] if output.requires_grad and id(output) not in excluded else []
    found: dict[int, Tensor] = {}
    seen: set[Any] = set(barrier)
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in excluded:
                found[id(variable)] = variable
            continue
        stack.extend(child for child, _ in reversed(node.next_functions) if child is not None)
    return list(found.values())

"""Looking at an autograd graph: which leaf tensors does a loss reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from polytask.autograd.fan_out import Junction
from polytask.errors import InputError


def leaves(output: Tensor, stop_at: Iterable[Tensor] = (), complete: bool = False) -> list[Tensor]:
    """The leaf tensors that ``output`` depends on, in a fixed order, without walking past ``stop_at``.

    Args:
        output: a tensor with graph.
        stop_at: tensors whose own inputs are not followed; a leaf among them is left out.
        complete: refuse graphs that hide leaves.

    Returns:
        Leaves that require gradients, each once. Cost: one visit a node of the graph, on the host.

    Raises:
        InputError: with ``complete``, a reentrant activation checkpoint: what it computes with has no place in the graph.
    """
    barrier = {t.grad_fn for t in stop_at if t.grad_fn is not None}
    excluded = {id(t) for t in stop_at}
    if output.grad_fn is None:
        return [output] if output.requires_grad and id(output) not in excluded else []
    found: dict[int, Tensor] = {}
    # what a node depends on may differ between its outputs (linear heads run as one product): outputs are visited one by one
    seen: set[tuple[Any, int]] = set()
    stack: list[tuple[Any, int]] = [(output.grad_fn, output.output_nr)]
    while stack:
        node, output_number = stack.pop()
        junction = getattr(node, "junction", None)
        joined = junction if isinstance(junction, Junction) and junction.bias else None
        entry = (node, output_number if joined else 0)
        if entry in seen or node in barrier:
            continue
        seen.add(entry)
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in excluded:
                found[id(variable)] = variable
            continue
        if complete and type(node).__name__ == "CheckpointFunctionBackward":
            raise InputError(
                "the model uses reentrant activation checkpoints, which hide parameters from exact gradients of single losses: "
                "make them with use_reentrant=False, or balance at level='representation'"
            )
        children = node.next_functions
        if joined:
            children = [children[i] for i in joined.inputs_of(output_number)]
        stack.extend(child for child in reversed(children) if child[0] is not None)
    return list(found.values())

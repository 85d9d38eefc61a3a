"""Several representations that are balanced together: one may be computed from another, and all influence passes through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polytask.autograd import leaves
from polytask.errors import InputError


def seeds(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    r"""What the backward pass has to start with at each feature so that the wanted gradient arrives there.

    What starts at a feature flows on to those it was computed from: with :math:`J_{fg}` the derivative of g by f,

    .. math:: s_f = d_f - \sum_{g \text{ from } f} J_{fg}^\top s_g .

    Args:
        features: tensors of one graph.
        wanted: d, the gradient that is to arrive at each of them.

    Returns:
        s, the wanted gradients themselves where no feature comes from another. Cost: one visit a node of their graph, and one backward
        pass between features for each that another comes from.
    """
    if len(features) == 1:
        return list(wanted)
    above = _above(features)
    found: dict[int, Tensor] = {}
    for i in sorted(range(len(features)), key=lambda i: len(above[i])):
        over = [j for j in above[i] if j in found]
        found[i] = wanted[i]
        if over:
            (flown,) = torch.autograd.grad(
                [features[j] for j in over],
                [features[i]],
                [found[j] for j in over],
                retain_graph=True,
                allow_unused=True,
            )
            if flown is not None:
                found[i] = wanted[i] - flown
    return [found[i] for i in range(len(features))]


def _above(features: Sequence[Tensor]) -> list[list[int]]:
    """For each feature, positions of those that are computed from it."""
    at: dict[Any, list[int]] = {}
    for i, f in enumerate(features):
        if f.grad_fn is not None:
            at.setdefault(f.grad_fn, []).append(i)
    above: list[list[int]] = [[] for _ in features]
    for j, g in enumerate(features):
        seen: set[Any] = set()
        stack = [] if g.grad_fn is None else [g.grad_fn]
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is not None and node not in seen:
                    seen.add(node)
                    stack.append(node)
        for node in seen & set(at):
            for i in at[node]:
                above[i].append(j)
    return above


def refuse_detours(losses: Mapping[str, Tensor], features: Sequence[Tensor]) -> None:
    """Whether a loss reaches what the features are computed from on another way too.

    Raises:
        InputError: where one does: its gradient there would be counted twice.
    """
    below = {id(p) for f in features for p in leaves(f)}
    for name, loss in losses.items():
        for p in leaves(loss, stop_at=features):
            if id(p) in below:
                raise InputError(
                    f"the loss of task {name!r} reaches a parameter of shape {tuple(p.shape)} both through features= and beside them: "
                    "give all representations that it reads, or balance at level='exact'"
                )

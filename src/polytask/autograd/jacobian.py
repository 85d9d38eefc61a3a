"""The exact Jacobian of several losses, written once into one buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd.workspace import Workspace


def jacobian(
    losses: Sequence[Float[Tensor, ""]],
    parameters: Sequence[Tensor],
    own: Sequence[Sequence[Tensor]] | None = None,
    retain_graph: bool = False,
    workspace: Workspace | None = None,
    padding: int = 0,
) -> tuple[Float[Tensor, "tasks coordinates"], list[list[Tensor | None]]]:
    """Gradients of every loss with respect to the same parameters, one backward pass a loss.

    Args:
        losses: K scalars with graph.
        parameters: the P coordinates, in the order in which they are laid out in a row.
        own: for each loss, further tensors whose gradients come out of the same pass (task-specific parameters).
        retain_graph: keep the graph after the last pass.
        workspace: where J is written; new memory when omitted.
        padding: columns of zeros after the last.

    Returns:
        J, shape (K, P + padding), in the parameters' dtype, zeros where a loss does not reach a parameter; and the gradients of ``own``.
        Cost: K backward passes, K x P numbers.
    """
    sizes = [p.numel() for p in parameters]
    rows = (workspace or Workspace()).matrix(len(losses), sum(sizes) + padding, parameters[0])
    rows[:, sum(sizes) :] = 0
    extra: list[list[Tensor | None]] = []
    for k, loss in enumerate(losses):
        mine = list(own[k]) if own is not None else []
        keep = retain_graph or k + 1 < len(losses)
        found = torch.autograd.grad(loss, [*parameters, *mine], retain_graph=keep, allow_unused=True)
        offset = 0
        for size, g in zip(sizes, found[: len(parameters)], strict=True):
            cell = rows[k, offset : offset + size]
            if g is None:
                cell.zero_()
            else:
                cell.copy_(g.reshape(-1))
            offset += size
        extra.append(list(found[len(parameters) :]))
    return rows, extra

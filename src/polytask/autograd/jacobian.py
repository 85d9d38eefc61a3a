"""The exact Jacobian of several losses, written once into one buffer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd.coordinates import coordinates, flat, number_type
from polytask.autograd.workspace import Workspace

logger = logging.getLogger(__name__)


def jacobian(
    losses: Sequence[Float[Tensor, ""]],
    parameters: Sequence[Tensor],
    own: Sequence[Sequence[Tensor]] | None = None,
    retain_graph: bool = False,
    workspace: Workspace | None = None,
    padding: int = 0,
    together: int = 1,
) -> tuple[Float[Tensor, "tasks coordinates"], list[list[Tensor | None]]]:
    """Gradients of every loss with respect to the same parameters, one backward pass a loss.

    Args:
        losses: K scalars with graph.
        parameters: the P coordinates, in the order in which they are laid out in a row.
        own: for each loss, further tensors whose gradients come out of the same pass (task-specific parameters).
        retain_graph: keep the graph after the last pass.
        workspace: where J is written; new memory when omitted.
        padding: columns of zeros after the last.
        together: how many losses go through one batched backward pass. 1, a pass a loss, is at least as fast on CPUs for
            perceptrons, convolutions and transformers (batched passes took 1.0 to 2.1 times as long); larger ones are for devices that
            a single pass leaves idle: :func:`~polytask.autograd.probe` tells. What cannot be batched (custom functions, compiled parts)
            falls back to a pass a loss, and the log says so.

    Returns:
        J, shape (K, P + padding), in the widest of the parameters' types, two columns for a complex number, zeros where a loss does not
        reach a parameter; and the gradients of ``own``.
        Cost: K backward passes, K x P numbers.
    """
    sizes = [coordinates(p) for p in parameters]
    like = torch.empty(0, dtype=number_type(parameters), device=parameters[0].device)
    rows = (workspace or Workspace()).matrix(len(losses), sum(sizes) + padding, like)
    rows[:, sum(sizes) :] = 0
    extra: list[list[Tensor | None]] = []
    for start in range(0, len(losses), together):
        some = losses[start : start + together]
        mine = [list(own[start + i]) if own is not None else [] for i in range(len(some))]
        keep = retain_graph or start + len(some) < len(losses)
        for k, found in enumerate(_gradients(some, parameters, mine, keep), start):
            pieces = torch.split(rows[k, : sum(sizes)], sizes)
            for cell, g in zip(pieces, found[: len(parameters)], strict=True):
                if g is None:
                    cell.zero_()
                else:
                    cell.copy_(flat(g))
            extra.append(found[len(parameters) :])
    return rows, extra


def _gradients(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], own: list[list[Tensor]], retain_graph: bool
) -> Iterator[list[Tensor | None]]:
    """For each loss its gradients with respect to the parameters and its own tensors."""
    if len(losses) > 1:
        heads = list({id(p): p for mine in own for p in mine}.values())
        try:
            found = torch.autograd.grad(
                torch.stack(list(losses)),
                [*parameters, *heads],
                torch.eye(len(losses), dtype=losses[0].dtype, device=losses[0].device),
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
        except (RuntimeError, NotImplementedError) as error:
            logger.info("gradients of %d losses are not taken together: %s", len(losses), str(error).splitlines()[0])
        else:
            place = {id(p): i for i, p in enumerate(heads, len(parameters))}
            for k, mine in enumerate(own):
                wanted = [*found[: len(parameters)], *(found[place[id(p)]] for p in mine)]
                yield [None if g is None else g[k] for g in wanted]
            return
    for k, (loss, mine) in enumerate(zip(losses, own, strict=True)):
        keep = retain_graph or k + 1 < len(losses)
        yield list(torch.autograd.grad(loss, [*parameters, *mine], retain_graph=keep, allow_unused=True))

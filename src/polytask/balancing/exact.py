"""Balancing exact gradients at the parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from polytask.autograd import (
    DenseGradients,
    Group,
    Processes,
    Shared,
    SlicedGradients,
    TaskGradients,
    apart,
    coordinates,
    flat,
    jacobian,
    layerwise_gradients,
    leaves,
    partition,
    probe,
    shape_key,
)
from polytask.autograd.layerwise import UnsupportedGraphError, streaming_pays
from polytask.balancing.base import Balancer, GramianWeighting
from polytask.balancing.losses import Step
from polytask.balancing.observation import Observation
from polytask.balancing.weighing import remaining, reused, unusable, weigh, weigh_gramian

logger = logging.getLogger(__name__)

# a Jacobian of more bytes than this is not held where the method needs its Gramian only
STREAM_ABOVE = 2**28
# numbers that may be held for combinations where the parameters themselves are fewer: 16 MB in float32
HOLD = 2**22


def exact(balancer: Balancer, step: Step, shared: Shared) -> Observation:
    """Fill ``.grad`` from gradients of single losses at the parameters."""
    reached = [leaves(loss, complete=True) for loss in step.scalars]
    groups, own = partition(step.names, len(step.names) == len(balancer.tasks or ()), reached, shared)
    if not groups:
        return _plain(step, own)
    whole = len(groups) == 1 and groups[0].key is None and len(groups[0].members) == len(step.names)
    if whole:
        weights = balancer.reuse()
        if weights is not None:
            return _weighted(*reused(weights, step, "exact"), step, groups[0].parameters, own)
        if isinstance(balancer, GramianWeighting) and step.processes is None and _streams(balancer, step, groups[0]):
            try:
                return _streamed(balancer, step, groups[0].parameters, own)
            except UnsupportedGraphError as error:
                logger.info("the Gramian cannot be streamed (%s): the Jacobian is held", error)
        return _by_jacobian(balancer, step, groups[0].parameters, own)
    return _by_groups(balancer, step, groups, own)


def _plain(step: Step, own: list[list[Tensor]]) -> Observation:
    """Nothing is shared: every loss to its own parameters."""
    heads = _distinct(own)
    _add(heads, list(torch.autograd.grad(step.total, heads, allow_unused=True)), step.processes)
    return Observation(tuple(step.names), step.values, torch.ones_like(step.values), None, "exact", step.skipped)


def _streams(balancer: Balancer, step: Step, group: Group) -> bool:
    if balancer.workspace.walks.get(_key(step, group.parameters)) is False or any(s.is_leaf for s in step.scalars):
        return False
    n_bytes = len(step.names) * sum(p.numel() * p.element_size() for p in group.parameters)
    return n_bytes > STREAM_ABOVE or streaming_pays(step.scalars, group.parameters)


def _key(step: Step, parameters: list[Tensor]) -> int:
    return hash((len(step.names), *map(id, parameters)))


def _streamed(balancer: Balancer, step: Step, parameters: list[Tensor], own: list[list[Tensor]]) -> Observation:
    """The Gramian without the Jacobian, then a combination of what each layer held, or one backward pass of the weighted losses."""
    gradients = layerwise_gradients(step.scaled_losses, parameters, max(HOLD, sum(p.numel() for p in parameters)))
    C = gradients.gramian / step.scale**2
    finite = torch.isfinite(C.diagonal()).tolist()
    if not all(finite):  # which tasks to leave out, if any, is decided where all gradients are at hand
        return _by_jacobian(balancer, step, parameters, own)
    trusted, key = balancer.workspace.walks, _key(step, parameters)
    if key not in trusted:
        trusted[key] = gradients.agrees_with_engine(step.scaled_losses, parameters)
        if not trusted[key]:
            logger.info("hooks change gradients on their way, which layer by layer are not seen: the Jacobian is held")
            return _by_jacobian(balancer, step, parameters, own)
    w, seen = weigh_gramian(balancer, C, step, "exact")
    combined = gradients.combination(w)
    if combined is None:
        return _weighted(w, seen, step, parameters, own)
    heads = _distinct(own)
    if heads:
        _add(heads, torch.autograd.grad(step.total, heads, allow_unused=True), step.processes)
    for p, g in combined:
        p.grad = g if p.grad is None else p.grad + g
    return seen


def _weighted(
    w: Tensor, seen: Observation, step: Step, parameters: list[Tensor], own: list[list[Tensor]]
) -> Observation:
    """One backward pass of the weighted losses, and each loss to its own parameters."""
    heads = _distinct(own)
    its = list(torch.autograd.grad(step.total, heads, retain_graph=True, allow_unused=True)) if heads else []
    weighted = (w.to(step.scalars[0]) * torch.stack(step.scaled_losses)).sum()
    common = list(torch.autograd.grad(weighted, parameters, allow_unused=True))
    if seen.gramian is None and unusable([g for g in [*its, *common] if g is not None], step):
        return step.not_taken("exact", ())
    _add(heads, its, step.processes)
    _add(parameters, common, step.processes)
    return seen


def _by_jacobian(balancer: Balancer, step: Step, parameters: list[Tensor], own: list[list[Tensor]]) -> Observation:
    """All gradients of single losses in one buffer."""
    P = sum(map(coordinates, parameters))
    processes = step.processes
    padding = processes.padded(P) - P if processes else 0
    together = _together(balancer, step, parameters, own)
    rows, extra = jacobian(
        step.scaled_losses, parameters, own, workspace=balancer.workspace, padding=padding, together=together
    )
    gradients: TaskGradients = SlicedGradients(rows, P, processes) if processes else DenseGradients(rows)
    direction, seen = weigh(balancer, gradients, step, "exact")
    if direction is None:
        return seen
    _add_flat(parameters, direction)
    _add_own(own, extra, step, seen)
    return seen


def _together(balancer: Balancer, step: Step, parameters: list[Tensor], own: list[list[Tensor]]) -> int:
    """How many losses go through one backward pass."""
    if isinstance(step.together, int):
        return step.together
    if len(step.names) == 1 or (step.together == "auto" and parameters[0].device.type == "cpu"):
        return 1
    key = shape_key(step.scalars, parameters)
    if key not in balancer.probed:
        found = torch.tensor(probe(step.scaled_losses, parameters, own, balancer.workspace))
        balancer.probed[key] = int(step.processes.first(found) if step.processes is not None else found)
        logger.info("%s: %d to a backward pass", key, balancer.probed[key])
    return balancer.probed[key]


def _by_groups(balancer: Balancer, step: Step, groups: list[Group], own: list[list[Tensor]]) -> Observation:
    """Each group of parameters in a direction of its own, from one Jacobian."""
    parameters = [p for g in groups for p in g.parameters]
    together = _together(balancer, step, parameters, own)
    rows, extra = jacobian(step.scaled_losses, parameters, own, workspace=balancer.workspace, together=together)
    wrong = (~torch.isfinite(rows)).any(1).int()
    if step.processes is not None:
        step.processes.sum_(wrong)
    bad = [n for n, w in zip(step.names, wrong.tolist(), strict=True) if w]
    kept = remaining(bad, step)
    if bad and step.scaled:
        _add_flat(parameters, torch.full_like(rows[0], torch.nan))
    if bad and not kept:
        return step.not_taken("exact", bad)
    fewer = step.some([step.names[k] for k in kept])
    fewer.skipped = (*step.skipped, *bad)
    place = {k: i for i, k in enumerate(kept)}
    start, seen, directions = 0, {}, []
    for g in groups:
        columns = rows[:, start : start + g.size]
        start += g.size
        members = [k for k in g.members if k in place]
        if not members:
            continue
        some = fewer.some([step.names[k] for k in members])
        served = balancer if g.key is None else balancer.branch(g.key)
        served.bind(some.names)
        mine = columns if len(members) == len(rows) else columns[members]
        direction, seen[g.key or ""] = weigh(served, _averaged(mine, step.processes), some, "exact")
        assert direction is not None
        directions.append((g.parameters, direction))
    for its, direction in directions:
        _add_flat(its, direction)
    widest = max(seen, key=lambda key: len(seen[key].tasks))
    observation = replace(seen.get("", seen[widest]), groups={key or " ".join(o.tasks): o for key, o in seen.items()})
    _add_own(own, extra, step, observation)
    return observation


def _averaged(rows: Tensor, processes: Processes | None) -> TaskGradients:
    if processes is None:
        return DenseGradients(rows)
    n = rows.shape[1]
    return SlicedGradients(nn.functional.pad(rows, (0, processes.padded(n) - n)), n, processes)


def _add_own(own: list[list[Tensor]], extra: list[list[Tensor | None]], step: Step, seen: Observation) -> None:
    """The gradients of the parameters that belong to single tasks, those left out excepted."""
    total: dict[Tensor, Tensor] = {}
    for name, mine, gradients in zip(step.names, own, extra, strict=True):
        if name in seen.skipped and seen.taken:
            continue
        for p, g in zip(mine, gradients, strict=True):
            if g is not None:
                total[p] = total[p] + g if p in total else g
    _add(list(total), list(total.values()), step.processes)


def _add_flat(parameters: list[Tensor], direction: Tensor) -> None:
    _add(parameters, apart(direction, parameters), None)


def _add(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], processes: Processes | None) -> None:
    """Add to ``.grad``: the mean over processes, where there are several."""
    if processes is not None and parameters:
        whole = torch.cat(
            [flat(torch.zeros_like(p) if g is None else g) for p, g in zip(parameters, gradients, strict=True)]
        )
        _add_flat(list(parameters), processes.sum_(whole) / processes.size)
        return
    for p, g in zip(parameters, gradients, strict=True):
        if g is not None:
            p.grad = g.detach().clone() if p.grad is None else cast(Any, p.grad) + g


def _distinct(own: list[list[Tensor]]) -> list[Tensor]:
    return list({id(p): p for mine in own for p in mine}.values())

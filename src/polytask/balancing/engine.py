"""The one line that replaces ``sum(losses).backward()``."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.autograd import DenseGradients, FanOut, TaskGradients, gramian, jacobian, layerwise_gramian, leaves
from polytask.autograd.fan_out import Select
from polytask.autograd.layerwise import UnsupportedGraphError, streaming_pays
from polytask.balancing.base import Balancer, GradientAggregator, GramianWeighting, LossWeighting, Observation
from polytask.errors import InputError, TrainingError

logger = logging.getLogger(__name__)

# a Jacobian of more bytes than this is not held where the method needs its Gramian only
STREAM_ABOVE = 2**28

Losses = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
Level = Literal["auto", "representation", "exact"]
Features = FanOut | Tensor | Mapping[str, FanOut | Tensor] | Sequence[FanOut | Tensor] | None


def backward(
    losses: Losses,
    *,
    shared: Iterable[Tensor] | nn.Module | None = None,
    balancer: Balancer | str = "equal",
    features: Features = None,
    level: Level = "auto",
    scaler: torch.amp.GradScaler | None = None,
    observe: bool = False,
) -> Observation:
    r"""Fill ``.grad`` of shared and task parameters with what the balancer makes of the losses.

    Shared parameters receive :math:`\sum_i w_i \nabla L_i` (or what the aggregator returns); parameters that belong
    to one task receive the gradient of their own loss, unless the method weighs the losses themselves. Like
    ``Tensor.backward``, gradients are **added** to what ``.grad`` already holds.

    Args:
        losses: {task: scalar}, a sequence of scalars, or a tensor of shape (tasks,), all with graph. Absent tasks are left out.
        shared: the parameters to be balanced; all that at least two losses reach when omitted.
        balancer: a balancer, kept by the caller from step to step; or the name of one without state.
        features: the shared representation(s) z on which all shared influence passes: ``model.features`` of a
            :class:`~polytask.MultiTaskModel`, or the tensors themselves.
        level: ``exact`` takes gradients at the parameters (K backward passes); ``representation`` takes them at ``features``
            (one pass through the trunk; an upper-bound surrogate); ``auto`` prefers the second where features are given.
        scaler: the gradient scaler of mixed precision; the gradients then stand scaled, as ``scaler.unscale_`` and ``scaler.step`` expect.
        observe: let methods that need loss values only report the Gramian too, where ``features`` make it free.

    Returns:
        What the step saw: losses, weights, Gramian. The same as ``balancer.observation``.

    Raises:
        InputError: losses that are not scalars with graph, that are given twice, shared parameters no loss reaches, ``level``
            without ``features``; always before any ``.grad`` is touched.
        TrainingError: a loss or a task's gradient that is not finite; the message names the task.

    Cost: one backward pass for loss weightings and at representation level. At exact level K passes and K x P numbers; where those
    would exceed 256 MiB, or wide linear layers meet few examples, Gramian methods take their Gramian layer by layer instead: K passes
    that form no weight gradients where inner products are cheaper without, and one pass of the weighted losses.
    """
    named = _named(losses)
    if isinstance(balancer, str):
        from polytask.balancing import make

        balancer = make(balancer)
    names = list(named)
    balancer.bind(names)
    # asking a scaler to scale is what makes a fresh one ready for unscale_ and step
    scale = float(scaler.scale(torch.ones(()))) if scaler is not None and scaler.is_enabled() else 1.0
    # one by one: unstacking a stack would send every pass through all heads, with zeros
    each = [balancer.transform(loss if loss.ndim == 0 else loss.reshape(())) for loss in named.values()]
    stacked = torch.stack(each)
    _check_finite(stacked.detach(), names)
    ports = _features(features)
    if isinstance(balancer, LossWeighting):
        observation = _values(balancer, stacked, names, ports if observe else [], scale)
    elif level == "exact" or (level == "auto" and not ports):
        observation = _exact(balancer, names, each, shared, scale)
    elif not ports:
        raise InputError("level='representation' needs features=: the shared representation that every head reads")
    else:
        observation = _representation(balancer, each, stacked, names, ports, scale)
    balancer.observation = observation
    return observation


def _named(losses: Losses) -> dict[str, Tensor]:
    if isinstance(losses, Mapping):
        named = dict(losses)
    elif isinstance(losses, Tensor) and losses.ndim != 1:
        raise InputError(
            f"a tensor of losses has shape (tasks,), not {tuple(losses.shape)}; name the losses in a dict or give a list"
        )
    else:
        named = {str(i): loss for i, loss in enumerate(losses)}
    if not named:
        raise InputError("there is no loss to differentiate")
    seen: dict[int, str] = {}
    for name, loss in named.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss of task {name!r} must be a scalar tensor, not {what}")
        if not loss.requires_grad:
            raise InputError(
                f"the loss of task {name!r} has no graph: no parameter that requires gradients leads to it"
            )
        if id(loss) in seen:
            raise InputError(f"the same loss was given for the tasks {seen[id(loss)]!r} and {name!r}")
        seen[id(loss)] = name
    return named


def _check_finite(values: Tensor, names: Sequence[str]) -> None:
    if math.isfinite(values.sum().item()):
        return
    bad = [(n, v) for n, v in zip(names, values.tolist(), strict=True) if not math.isfinite(v)]
    if bad:
        raise TrainingError("; ".join(f"the loss of task {n!r} is {v}" for n, v in bad) + ": no gradient was touched")


def _features(features: Features) -> list[FanOut | Tensor]:
    if features is None:
        return []
    if isinstance(features, FanOut | Tensor):
        return [features]
    return list(features.values()) if isinstance(features, Mapping) else list(features)


def _values(
    balancer: LossWeighting,
    losses: Float[Tensor, " tasks"],
    names: list[str],
    ports: list[FanOut | Tensor],
    scale: float,
) -> Observation:
    total, weights = balancer.combine(losses)
    observation = Observation(tuple(names), losses.detach(), weights, None, "values")
    port = ports[0] if len(ports) == 1 and isinstance(ports[0], FanOut) else None
    if port is not None:

        def watch(present: frozenset[str], select: Select) -> Tensor:
            if present >= set(names):
                w = (weights * scale).double()
                observation.gramian = select(names).gramian() / torch.outer(w, w)
            everyone = [n for n in names if n in present]
            return select(everyone).combination(total.new_ones(len(everyone)))

        port.combine, port.workspace = watch, balancer.workspace
    try:
        (total * scale if scale != 1.0 else total).backward()  # type: ignore[no-untyped-call]
    finally:
        if port is not None:
            port.combine = None
    return observation


def _weigh(
    balancer: Balancer, gradients: TaskGradients, losses: Tensor, names: list[str], scale: float, level: str
) -> tuple[Tensor, Observation]:
    """The direction for gradients that stand multiplied by ``scale``, multiplied by it again, and what was seen on the way."""
    values = losses.detach()
    if isinstance(balancer, GradientAggregator):
        rows = gradients.rows()
        _refuse([n for n, ok in zip(names, torch.isfinite(rows).all(1).tolist(), strict=True) if not ok])
        direction = balancer.direction(rows / scale if scale != 1.0 else rows, values)
        seen = Observation(tuple(names), values, None, gramian(rows) / scale**2, level)
        return direction * scale if scale != 1.0 else direction, seen
    assert isinstance(balancer, GramianWeighting)
    w, seen = _weigh_gramian(balancer, gradients.gramian() / scale**2, values, names, level)
    return gradients.combination(w), seen


def _weigh_gramian(
    balancer: GramianWeighting, C: Tensor, values: Tensor, names: list[str], level: str
) -> tuple[Tensor, Observation]:
    host = C.cpu().numpy()
    _refuse([n for n, ok in zip(names, np.isfinite(np.diag(host)), strict=True) if not ok])
    w = torch.from_numpy(balancer.weights_of(host, values.double().cpu().numpy())).to(C.device)
    return w, Observation(tuple(names), values, w.to(values), C, level)


def _refuse(names: list[str]) -> None:
    if names:
        raise TrainingError(f"the gradient of {', '.join(repr(n) for n in names)} is not finite although the loss is")


def _representation(
    balancer: Balancer,
    losses: list[Tensor],
    stacked: Tensor,
    names: list[str],
    ports: list[FanOut | Tensor],
    scale: float,
) -> Observation:
    if len(ports) == 1 and isinstance(ports[0], FanOut):
        return _one_pass(balancer, stacked, names, ports[0], scale)
    return _two_passes(balancer, losses, names, [f.tensor if isinstance(f, FanOut) else f for f in ports], scale)


def _one_pass(
    balancer: Balancer, losses: Float[Tensor, " tasks"], names: list[str], port: FanOut, scale: float
) -> Observation:
    seen: list[Observation] = []

    def combine(reached: frozenset[str], select: Select) -> Tensor:
        present = [n for n in names if n in reached]
        if present != names:
            balancer.bind(present)
        some = losses if present == names else losses[[names.index(n) for n in present]]
        direction, observation = _weigh(balancer, select(present), some, present, scale, "representation")
        seen.append(observation)
        return direction

    port.combine, port.workspace = combine, balancer.workspace
    try:
        total = losses.sum()
        (total * scale if scale != 1.0 else total).backward()  # type: ignore[no-untyped-call]
    finally:
        port.combine = None
    if not seen:
        raise InputError("no loss depends on the given features: is this the representation of the same forward pass?")
    return seen[0]


def _two_passes(
    balancer: Balancer, losses: list[Tensor], names: list[str], features: list[Tensor], scale: float
) -> Observation:
    """Plain tensors that all heads read: each loss back to the features, then the trunk once."""
    scaled = [loss * scale for loss in losses] if scale != 1.0 else losses
    total = torch.stack(scaled).sum()
    rows, _ = jacobian(scaled, features, retain_graph=True, workspace=balancer.workspace)
    if not bool(rows.any(dim=0).any()):
        raise InputError("no loss depends on the given features: is this the representation of the same forward pass?")
    direction, observation = _weigh(balancer, DenseGradients(rows), torch.stack(losses), names, scale, "representation")
    heads = leaves(total, stop_at=features)
    if heads:
        torch.autograd.backward(total, inputs=heads, retain_graph=True)
    pieces = torch.split(direction, [f.numel() for f in features])
    torch.autograd.backward(features, [d.view_as(f) for d, f in zip(pieces, features, strict=True)])
    return observation


def _exact(
    balancer: Balancer,
    names: list[str],
    losses: list[Tensor],
    shared: Iterable[Tensor] | nn.Module | None,
    scale: float,
) -> Observation:
    reached = [leaves(loss) for loss in losses]
    complete = len(names) == len(balancer.tasks or ())
    parameters, own = _partition(names if complete else None, reached, shared)
    scaled = [loss * scale for loss in losses] if scale != 1.0 else losses
    values = torch.stack(losses).detach()
    if not parameters:
        torch.stack(scaled).sum().backward()  # type: ignore[no-untyped-call]
        return Observation(tuple(names), values, torch.ones_like(values), None, "exact")
    n_bytes = len(losses) * sum(p.numel() * p.element_size() for p in parameters)
    if isinstance(balancer, GramianWeighting) and (n_bytes > STREAM_ABOVE or streaming_pays(losses, parameters)):
        try:
            return _exact_streamed(balancer, names, losses, scaled, parameters, own, scale)
        except UnsupportedGraphError as error:
            logger.info("the Gramian cannot be streamed (%s): the Jacobian is held, %d bytes", error, n_bytes)
    rows, extra = jacobian(scaled, parameters, own, workspace=balancer.workspace)
    direction, observation = _weigh(balancer, DenseGradients(rows), values, names, scale, "exact")
    for piece, p in zip(torch.split(direction, [p.numel() for p in parameters]), parameters, strict=True):
        _accumulate(p, piece.view_as(p))
    for mine, gradients in zip(own, extra, strict=True):
        for p, g in zip(mine, gradients, strict=True):
            if g is not None:
                _accumulate(p, g)
    return observation


def _exact_streamed(
    balancer: GramianWeighting,
    names: list[str],
    losses: list[Tensor],
    scaled: list[Tensor],
    parameters: list[Tensor],
    own: list[list[Tensor]],
    scale: float,
) -> Observation:
    """The Gramian without the Jacobian, then one backward pass of the weighted losses."""
    C = layerwise_gramian(scaled, parameters) / scale**2
    w, observation = _weigh_gramian(balancer, C, torch.stack(losses).detach(), names, "exact")
    heads = list({id(p): p for mine in own for p in mine}.values())
    if heads:
        torch.autograd.backward(torch.stack(scaled).sum(), inputs=heads, retain_graph=True)
    torch.autograd.backward((w.to(scaled[0]) * torch.stack(scaled)).sum(), inputs=parameters)
    return observation


def _partition(
    names: Sequence[str] | None, reached: list[list[Tensor]], shared: Iterable[Tensor] | nn.Module | None
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The shared parameters, and for each loss those it does not share. ``names`` are given where every task is present."""
    readers: dict[int, list[int]] = {}
    for k, mine in enumerate(reached):
        for p in mine:
            readers.setdefault(id(p), []).append(k)
    if shared is None:
        first_seen = {id(p): p for mine in reached for p in mine}
        parameters = [p for i, p in first_seen.items() if len(readers[i]) > 1]
    else:
        parameters = [p for p in (shared.parameters() if isinstance(shared, nn.Module) else shared) if p.requires_grad]
        if not any(id(p) in readers for p in parameters):
            raise InputError("no loss reaches any of the shared parameters: is this the model that made the losses?")
        lonely = [i for i, p in enumerate(parameters) if id(p) not in readers]
        if lonely:
            shapes = ", ".join(f"number {i} of shape {tuple(parameters[i].shape)}" for i in lonely[:3])
            raise InputError(f"no loss reaches shared parameter {shapes}: take it out of shared=, or freeze it")
        single = [(i, readers[id(p)][0]) for i, p in enumerate(parameters) if len(readers[id(p)]) == 1]
        if names is not None and len(names) > 1 and single:
            i, k = single[0]
            raise InputError(
                f"shared parameter number {i} of shape {tuple(parameters[i].shape)} is not shared: only the loss of {names[k]!r} reaches it"
            )
    belongs = {id(p) for p in parameters}
    return parameters, [[p for p in mine if id(p) not in belongs] for mine in reached]


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.detach().clone()
    else:
        parameter.grad = cast(Any, parameter.grad) + gradient

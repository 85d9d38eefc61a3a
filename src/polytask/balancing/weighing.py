"""Per-task gradients -> the direction of a step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from polytask.autograd import DenseGradients, TaskGradients
from polytask.balancing.base import Balancer, GradientAggregator, GramianWeighting, Vector, precision_of
from polytask.balancing.losses import Step
from polytask.balancing.observation import Observation
from polytask.errors import TrainingError


def weigh(balancer: Balancer, gradients: TaskGradients, step: Step, level: str) -> tuple[Tensor | None, Observation]:
    """Ask the method what to make of the gradients.

    Args:
        balancer: bound to the tasks of the step.
        gradients: one a task of the step, multiplied by its scale.
        step: the losses.
        level: where the gradients were taken.

    Returns:
        The direction, multiplied by the scale, None where the step is not to be taken; and what was seen.

    Raises:
        TrainingError: a gradient that is not finite, with ``on_nonfinite="raise"`` and without a gradient scaler.
    """
    weights = balancer.reuse()
    if weights is not None:
        return _kept_combination(weights, gradients, step, level)
    if isinstance(balancer, GradientAggregator):
        whole = gradients if step.processes is None else DenseGradients(gradients.rows())
        C = whole.gramian() / step.scale**2
        bad = _names(step, torch.isfinite(C.diagonal()).tolist())
        if bad:
            return _without(bad, balancer, gradients, step, level)
        direction = balancer.direction_at(whole, step.scale, step.values)
        return gradients.mine(direction), _observation(step, None, C, level)
    C = gradients.gramian() / step.scale**2
    bad = _names(step, np.isfinite(np.diag(C.cpu().numpy())).tolist())
    if bad:
        return _without(bad, balancer, gradients, step, level)
    w, seen = weigh_gramian(balancer, C, step, level)
    return gradients.combination(w), seen


def weigh_gramian(balancer: Balancer, C: Tensor, step: Step, level: str) -> tuple[Tensor, Observation]:
    """The weights for a finite Gramian; where several processes share the batch, those that the first of them finds."""
    assert isinstance(balancer, GramianWeighting)
    found = balancer.weights_of(C.cpu().numpy(), step.values.double().cpu().numpy(), precision_of(step.values))
    w = torch.from_numpy(found).to(C.device)
    if step.processes is not None:
        step.processes.first(w)
    return w, _observation(step, w, C, level)


def reused(weights: Vector, step: Step, level: str) -> tuple[Tensor, Observation]:
    """The weights of an earlier step, and what is seen of this one."""
    w = torch.from_numpy(weights).to(step.values.device)
    return w, _observation(step, w, None, level)


def unusable(gradients: Iterable[Tensor], step: Step) -> bool:
    """Whether combined gradients are not finite on any process, and ``.grad`` is to stay as it is because of them.

    Raises:
        TrainingError: with ``on_nonfinite="raise"`` and without a gradient scaler.
    """
    if step.scaled:  # the scaler looks itself
        return False
    finite = torch.stack([torch.isfinite(g).all() for g in gradients]).all()
    if step.processes is not None:
        finite = step.processes.sum_(finite.int()) == step.processes.size
    if bool(finite):
        return False
    if step.on_nonfinite == "raise":
        raise TrainingError("the gradient of the weighted losses is not finite although the losses are")
    return True


def _kept_combination(
    weights: Vector, gradients: TaskGradients, step: Step, level: str
) -> tuple[Tensor | None, Observation]:
    w, seen = reused(weights, step, level)
    direction = gradients.combination(w)
    return (None, step.not_taken(level, ())) if unusable([direction], step) else (direction, seen)


def remaining(bad: list[str], step: Step) -> list[int]:
    """Positions of the tasks that a step goes on with when the gradients of ``bad`` are not finite; none where it is not taken.

    Raises:
        TrainingError: with ``on_nonfinite="raise"`` and without a gradient scaler.
    """
    if bad and not step.scaled and step.on_nonfinite == "raise":
        raise TrainingError(f"the gradient of {', '.join(map(repr, bad))} is not finite although the loss is")
    if bad and (step.scaled or step.on_nonfinite == "skip-step"):
        return []
    return [i for i, n in enumerate(step.names) if n not in bad]


def _without(
    bad: list[str], balancer: Balancer, gradients: TaskGradients, step: Step, level: str
) -> tuple[Tensor | None, Observation]:
    kept = remaining(bad, step)
    if step.scaled:  # float16's scaler sees it, skips the step by itself and lowers its scale
        overflown = gradients.combination(torch.full((len(step.names),), torch.nan, dtype=torch.float64))
        return overflown, step.not_taken(level, bad)
    if not kept:
        return None, step.not_taken(level, bad)
    fewer = step.some([step.names[i] for i in kept])
    fewer.skipped = (*step.skipped, *bad)
    balancer.bind(fewer.names)
    return weigh(balancer, gradients.select(kept), fewer, level)


def _names(step: Step, finite: list[bool]) -> list[str]:
    return [n for n, ok in zip(step.names, finite, strict=True) if not ok]


def _observation(step: Step, weights: Tensor | None, C: Tensor | None, level: str) -> Observation:
    return Observation(
        tuple(step.names), step.values, None if weights is None else weights.to(step.values), C, level, step.skipped
    )

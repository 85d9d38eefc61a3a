"""Losses or gradients of several tasks -> one direction: one file a method."""

from __future__ import annotations

from typing import Any

from polytask.balancing.accumulation import Accumulation
from polytask.balancing.base import Balancer, GradientAggregator, GramianWeighting, LossWeighting, Preference
from polytask.balancing.engine import backward
from polytask.balancing.observation import Observation
from polytask.balancing.presets import resolve
from polytask.balancing.several_batches import backward_batches, step
from polytask.errors import InputError

__all__ = [
    "Accumulation",
    "Balancer",
    "GradientAggregator",
    "GramianWeighting",
    "LossWeighting",
    "Observation",
    "Preference",
    "backward",
    "backward_batches",
    "make",
    "step",
]


def make(name: str, **options: Any) -> Balancer:
    """Build a balancing method by its registered name or an alias (``nash_mtl``, ``NashMTL``, ``Nash_MTL``).

    Args:
        name: see ``polytask methods``; ``LOG_X`` is X with ``log_losses=True``.
        options: the method's own, and ``preference``, ``log_losses``, ``seed`` that all of them take.

    Raises:
        InputError: unknown name or option; the message names the nearest ones.
    """
    method, implied = resolve(name)
    unknown = [o for o in options if o not in method.options]
    if unknown:
        raise InputError(f"{method.name} has no option {unknown[0]!r}; it takes {', '.join(method.options)}")
    balancer: Balancer = method.factory(**{**implied, **options})
    return balancer

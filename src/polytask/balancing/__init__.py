"""Losses or gradients of several tasks -> one direction: one file a method."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from polytask.balancing.accumulation import Accumulation
from polytask.balancing.base import Balancer, GradientAggregator, GramianWeighting, LossWeighting, Preference
from polytask.balancing.engine import backward
from polytask.balancing.observation import Observation
from polytask.balancing.presets import resolve
from polytask.balancing.several_batches import backward_batches, step
from polytask.errors import InputError
from polytask.registry import Method

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
        options: the method's own, and ``preference``, ``log_losses``, ``every``, ``seed`` that all of them take; ``weights`` is another
            name for ``preference``, and a ``generator`` of torch or NumPy draws the seed.

    Raises:
        InputError: unknown name or option; the message names the nearest ones.
    """
    method, implied = resolve(name)
    given = _renamed(method, options)
    unknown = [o for o in given if o not in method.options]
    if unknown:
        near = difflib.get_close_matches(unknown[0], method.options, n=1)
        hint = f"did you mean {near[0]}? It takes" if near else "it takes"
        raise InputError(f"{method.name} has no option {unknown[0]!r}; {hint} {', '.join(method.options)}")
    balancer: Balancer = method.factory(**{**implied, **given})
    return balancer


def _renamed(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(options)
    for spoken, meant in (("weights", "preference"), ("generator", "seed")):
        if spoken in given and spoken not in method.options:
            if meant in given:
                raise InputError(f"{method.name} was given both {spoken}= and {meant}=, which mean the same")
            given[meant] = given.pop(spoken)
    if isinstance(given.get("seed"), torch.Generator):
        given["seed"] = int(torch.randint(2**63 - 1, (), generator=given["seed"], device=given["seed"].device))
    if isinstance(given.get("seed"), np.random.Generator):
        given["seed"] = int(given["seed"].integers(2**63 - 1))
    return given

"""What a step saw."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Observation:
    """What the last step saw: the raw material of logs and diagnoses.

    Attributes:
        tasks: the tasks that were present.
        losses: their losses, shape (tasks,), as given to the balancer, detached.
        weights: the coefficients of the combination, shape (tasks,), or None where the direction is not a combination.
        gramian: inner products of the task gradients, shape (tasks, tasks), float64, or None where no gradient was looked at.
        level: ``values``, ``representation`` or ``exact``: where those gradients were taken.
        skipped: tasks whose loss or gradient was not finite and that ``on_nonfinite`` left out.
        taken: False where ``.grad`` was left as it was (or, under a gradient scaler, holds what makes it skip the step).
        groups: what each group of shared parameters saw, by the tasks that touch it, where there are several; the other attributes
            are then those of the group that most tasks touch.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    weights: Tensor | None
    gramian: Tensor | None
    level: str
    skipped: tuple[str, ...] = ()
    taken: bool = True
    groups: dict[str, Observation] = field(default_factory=dict)

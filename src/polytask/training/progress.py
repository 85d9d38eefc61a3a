"""What a training run tells whoever shows it: the loop draws nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        epochs: epochs at most.
        step: steps finished in all.
        steps: steps at most in all, None where the data does not know its length.
        seconds: since the run began, earlier parts of a resumed run included.
        remaining: seconds left should no epoch stop early, None before the first step or where unknown.
        train_loss: {task: mean loss} of the last finished epoch.
        score: validation score of the last finished epoch (higher is better), None before.
        best_epoch: the epoch of the best score so far, counted from 1; 0 before the first.
        ended: why the run ended (``epochs``, ``patience``), empty while it goes on.
    """

    epoch: int
    epochs: int
    step: int
    steps: int | None
    seconds: float
    remaining: float | None
    train_loss: dict[str, float | None]
    score: float | None
    best_epoch: int
    ended: str = ""


ProgressCallback = Callable[[Progress], None]

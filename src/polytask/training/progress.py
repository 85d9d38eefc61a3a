"""What a training run tells whoever shows it: the loop draws nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


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


class Standing(Protocol):
    """What the display reads of a run's state."""

    epoch: int
    steps: int
    history: dict[str, Any]
    best: dict[str, Any]

    def seconds(self) -> float:
        """Seconds of training so far."""


class Display:
    """Tells a callback where a run stands, ten times a second at most.

    Args:
        callback: told a :class:`Progress`; None is told nothing.
        epochs: at most.
        steps_per_epoch: None where unknown.
    """

    def __init__(self, callback: ProgressCallback | None, epochs: int, steps_per_epoch: int | None) -> None:
        self.callback, self.epochs = callback, epochs
        self.steps = None if steps_per_epoch is None else steps_per_epoch * epochs
        self._began = time.perf_counter()
        self._told = 0.0
        self._first_step: int | None = None

    def show(self, state: Standing, *, always: bool = False, ended: str = "") -> None:
        """Tell the callback, unless that was done just now; ``always`` and the end are never left out."""
        if self.callback is None:
            return
        now = time.perf_counter()
        if self._first_step is None:  # a resumed run has steps behind it that took none of this process's time
            self._first_step = state.steps - 1
        if not (always or ended or now - self._told > 0.1):
            return
        self._told = now
        done = state.steps - self._first_step
        left = (now - self._began) / done * (self.steps - state.steps) if self.steps is not None and done > 0 else None
        losses = {n: values[-1] if values else None for n, values in state.history["train_loss"].items()}
        score = state.history["score"][-1] if state.history["score"] else None
        self.callback(
            Progress(
                epoch=state.epoch,
                epochs=self.epochs,
                step=state.steps,
                steps=self.steps,
                seconds=state.seconds(),
                remaining=0.0 if ended else left,
                train_loss=losses,
                score=score,
                best_epoch=int(state.best["epoch"]),
                ended=ended,
            )
        )

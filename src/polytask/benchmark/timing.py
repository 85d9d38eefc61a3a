"""Ratios of times, measured so that a slow moment of the machine touches both sides of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K")
REPEATS = 5


@dataclass(frozen=True)
class Ratio:
    """A ratio of times over the rounds.

    Attributes:
        median: of the rounds' own ratios.
        low: their lower quartile.
        high: their upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: list[float]) -> Ratio:
        """Median and quartiles of the rounds."""
        if len(rounds) == 1:
            return cls(rounds[0], rounds[0], rounds[0])
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(median, low, high)


def ratios(
    steps: Mapping[K, Callable[[], object]],
    plain: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, list[float]]:
    """The time of every step over that of a plain step, once a round.

    In a round every step takes turns with the plain one, :data:`REPEATS` times, and the fastest of each counts: what interrupts a step can
    only make it slower. The order of the steps moves on by one from round to round.

    Args:
        steps: warmed up.
        plain: what they are compared with, warmed up.
        rounds: how many.
        clock: seconds.

    Returns:
        {step: one ratio a round}.
    """
    found: dict[K, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(rounds):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            reference, mine = [], []
            for _ in range(REPEATS):
                reference.append(_seconds(plain, clock))
                mine.append(_seconds(steps[name], clock))
            found[name].append(min(mine) / min(reference))
    return found


def _seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    step()
    return clock() - started

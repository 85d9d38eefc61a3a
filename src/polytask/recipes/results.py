"""Who takes part in a recipe, what its trials measured, and the few statistics that a claim is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One contestant: the method, or something that stands beside it.

    Args:
        name: its key in the rows of the evidence.
        label: its name in tables and figures.
        role: ``reference`` (single tasks), ``baseline``, or ``method``.
        candidates: settings among which the arm may choose for each seed by ``Trial.selection``: this is how a tuned scalarization
            is written. Empty where there is nothing to choose.
    """

    name: str
    label: str
    role: Literal["reference", "baseline", "method"] = "baseline"
    candidates: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Measure:
    """One thing that every trial measures.

    Args:
        name: its key in the rows of the evidence.
        text: what it is, in words, with its unit.
        higher_is_better: the direction of improvement; None for what is shown and not judged.
    """

    name: str
    text: str
    higher_is_better: bool | None = False


@dataclass(frozen=True)
class Trial:
    """What one arm gave with one seed.

    Args:
        values: {measure: value}, on data that selected nothing.
        selection: what candidates of one arm are compared by (lower is better), from validation data only.
        curves: {name: values over steps} for the figures.
    """

    values: Mapping[str, float]
    selection: float | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the evidence: an arm, a seed, the candidate that was selected (None where there was no choice), the trial."""

    arm: str
    seed: int
    candidate: Any
    trial: Trial


class Results:
    """All rows of a run.

    Args:
        rows: one an arm and seed.
        measures: what was measured, in the order of the recipe.
    """

    def __init__(self, rows: Sequence[Row], measures: Sequence[Measure]) -> None:
        self.rows = tuple(rows)
        self.measures = {m.name: m for m in measures}

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in the order in which they ran."""
        return tuple(dict.fromkeys(row.seed for row in self.rows))

    def values(self, arm: str, measure: str) -> Vector:
        """One value a seed, shape (seeds,)."""
        found = [row.trial.values[measure] for row in self.rows if row.arm == arm]
        if not found:
            raise KeyError(f"no arm is called {arm!r}")
        return np.asarray(found, dtype=np.float64)

    def mean(self, arm: str, measure: str) -> float:
        """The mean over seeds."""
        return float(self.values(arm, measure).mean())

    def curve(self, arm: str, name: str) -> Vector:
        """One curve, shape (seeds, steps)."""
        return np.asarray([row.trial.curves[name] for row in self.rows if row.arm == arm], dtype=np.float64)

    def gain(self, arm: str, against: str, measure: str) -> Vector:
        """How much better ``arm`` is than ``against`` with the same seed, in the measure's unit, shape (seeds,); above 0 is better."""
        higher = self.measures[measure].higher_is_better
        if higher is None:
            raise ValueError(f"{measure} has no direction of improvement")
        return (self.values(arm, measure) - self.values(against, measure)) * (1.0 if higher else -1.0)

    def better(self, arm: str, against: str, *measures: str) -> bool:
        """Whether the mean of ``arm`` is strictly better on every one of the measures."""
        return all(float(self.gain(arm, against, m).mean()) > 0 for m in measures)

    def share_better(self, arm: str, against: str, *measures: str) -> float:
        """The share of seeds in which ``arm`` is strictly better on all of the measures at once."""
        return float(np.all([self.gain(arm, against, m) > 0 for m in measures], axis=0).mean())

    def summary(self, arm: str, measure: str) -> dict[str, float | None]:
        """Mean over seeds with its 95 % interval."""
        values = self.values(arm, measure)
        low, high = interval(values)
        return {"mean": float(values.mean()), "low": low, "high": high}


def interval(values: Vector, level: float = 0.95) -> tuple[float | None, float | None]:
    """Student's interval of the mean of independent values; (None, None) for fewer than two of them."""
    if len(values) < 2:
        return None, None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half

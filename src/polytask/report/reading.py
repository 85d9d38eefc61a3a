"""What the report reads out of ``results.json``: intervals, effects, methods, histories; missing values stay None."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from polytask.errors import InputError
from polytask.report.numbers import decimals_for, finite

Results = Mapping[str, Any]


class Interval(NamedTuple):
    """A mean with its confidence interval; any part may be missing."""

    mean: float | None
    low: float | None
    high: float | None

    @property
    def known(self) -> bool:
        """Whether both ends are there."""
        return self.low is not None and self.high is not None


def interval(found: Mapping[str, Any] | None) -> Interval:
    """Read ``{"mean", "low", "high"}``."""
    found = found or {}
    return Interval(finite(found.get("mean")), finite(found.get("low")), finite(found.get("high")))


def delta_m(method: Mapping[str, Any], over: str) -> Interval:
    """A method's Delta_m in percent, over ``tasks`` or over ``metrics``; higher is better."""
    low, high = [*(method.get(f"delta_m_{over}_interval") or ()), None, None][:2]
    return Interval(finite(method.get(f"delta_m_{over}")), finite(low), finite(high))


@dataclass(frozen=True)
class Effect:
    """A finding in a word, with a sign that survives grey print and a class for its colour."""

    word: str
    symbol: str
    style: str


GAINS = Effect("gains", "▲", "gain")
LOSES = Effect("loses", "▼", "lose")
UNCLEAR = Effect("no clear change", "●", "even")
UNKNOWN = Effect("no interval", "○", "even")
_OF_TASK = {"gains": GAINS, "loses": LOSES, "indifferent": UNCLEAR}


def effect_of_task(task: Mapping[str, Any]) -> Effect:
    """The study's own word for a task."""
    return _OF_TASK.get(str(task.get("effect")), UNKNOWN)


def effect_of_metric(metric: Mapping[str, Any]) -> Effect:
    """Gains or loses where the interval of the difference lies on one side of zero."""
    difference = interval(metric.get("difference"))
    if difference.low is None or difference.high is None:
        return UNKNOWN
    if difference.low <= 0 <= difference.high:
        return UNCLEAR
    return GAINS if (difference.low > 0) == bool(metric.get("higher_is_better", True)) else LOSES


def improvement(metric: Mapping[str, Any]) -> Interval | None:
    """The difference in percent of the single-task value, positive = better; None where a percentage means nothing."""
    reference, difference = interval(metric.get("single_task")).mean, interval(metric.get("difference"))
    if not metric.get("ratio_scale", True) or not reference or difference.mean is None:
        return None
    return Interval(*_oriented(difference, metric, 100 / abs(reference)))


def oriented_difference(metric: Mapping[str, Any]) -> Interval:
    """The difference in the metric's own units, positive = better."""
    return Interval(*_oriented(interval(metric.get("difference")), metric, 1.0))


def decimals_of(metric: Mapping[str, Any]) -> int:
    """How many decimals the values of a metric are shown with: what the interval of the difference supports."""
    difference, single = interval(metric.get("difference")), interval(metric.get("single_task"))
    shown = difference if difference.known else single
    return decimals_for(shown.low, shown.high, single.mean)


def _oriented(
    difference: Interval, metric: Mapping[str, Any], factor: float
) -> tuple[float | None, float | None, float | None]:
    factor = factor if metric.get("higher_is_better", True) else -factor
    mean, low, high = (None if x is None else x * factor for x in difference)
    return (mean, low, high) if factor > 0 else (mean, high, low)


def check(results: Results) -> None:
    """Refuse what is not a run's results, before anything is written.

    Raises:
        InputError: a part that everything else hangs on is absent, or the schema is one this version does not know.
    """
    if results.get("schema", 1) != 1:
        raise InputError(f"results.json has schema {results['schema']!r}, but this polytask reads schema 1")
    for part in ("tasks", "methods", "verdict"):
        if part not in results:
            raise InputError(f"results.json has no part {part!r}: it is not the results of a finished run")


def ranked_methods(results: Results) -> list[Mapping[str, Any]]:
    """The methods by Delta_m over tasks, the best first, those without one last."""
    return sorted(results["methods"], key=lambda m: falling(m.get("delta_m_tasks")))


def falling(value: Any) -> float:
    """A key that sorts the largest value first and the missing ones last."""
    x = finite(value)
    return math.inf if x is None else -x


def method_of(results: Results, name: str | None) -> Mapping[str, Any]:
    """What stands of a method, nothing where it is unknown."""
    return next((m for m in results["methods"] if m.get("name") == name), dict[str, Any]())


def label_of(results: Results, name: str | None) -> str:
    """A method's label for people."""
    found = method_of(results, name)
    return str(found.get("label") or name or "none")


def reference_name(results: Results) -> str | None:
    """The method that all are compared with: single-task training."""
    return next((m.get("name") for m in results["methods"] if m.get("role") == "reference"), None)


def joint_name(results: Results) -> str | None:
    """The joint method shown beside the reference: the verdict's, or the best on validation rows where it names none."""
    verdict, reference = results["verdict"], reference_name(results)
    wanted = verdict.get("joint") or verdict.get("method")
    joint = [m for m in results["methods"] if m.get("name") != reference]
    best = sorted(joint, key=lambda m: (m.get("name") != wanted, falling(m.get("validation_score"))))
    return best[0].get("name") if best else None


def histories(results: Results, method: str | None) -> list[Mapping[str, Any]]:
    """The histories of a method, one a seed."""
    return [h for h in ((results.get("history") or {}).get(method) or {}).values() if h]


def sentences(text: str) -> list[str]:
    """A text cut after full stops that are followed by a capital."""
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip()) if s]


def mean_of(values: Iterable[Any]) -> float | None:
    """The mean of the values that are there."""
    kept = [x for x in map(finite, values) if x is not None]
    return fmean(kept) if kept else None


CONFLICT = Effect("conflict above the null", "▼", "lose")
TESTED = Effect("conflict by the test", "▼", "lose")
EARLIER = Effect("conflict in some epochs", "●", "even")
ALIGNED = Effect("aligned on average", "●", "even")
NOISE = Effect("within noise", "●", "even")
NO_NULL = Effect("no null to compare", "○", "even")


@dataclass(frozen=True)
class Pair:
    """How the gradients of two tasks met over the observed epochs, beside the null: mini-batches of one task.

    Attributes:
        first: name of one task.
        second: name of the other.
        cosine: mean over the epochs.
        conflict: share of mini-batches with opposed gradients, an entry an epoch.
        null: the same within one task, averaged over the two.
        tested: whether the study's own test called them conflicting, an entry an epoch; None where it made none.
    """

    first: str
    second: str
    cosine: float | None
    conflict: tuple[float | None, ...]
    null: tuple[float | None, ...]
    tested: tuple[bool, ...] | None

    @property
    def rate(self) -> float | None:
        """Share of mini-batches with opposed gradients, mean over the epochs."""
        return mean_of(self.conflict)

    @property
    def null_rate(self) -> float | None:
        """The same within one task, averaged over the two tasks and the epochs."""
        return mean_of(self.null)

    @property
    def excess(self) -> float | None:
        """Conflict beyond the null, mean over the epochs where both are known."""
        return mean_of(c - n for c, n in self._met())

    @property
    def epochs_above(self) -> tuple[int, int]:
        """In how many epochs conflict was more frequent than under the null, and how many were observed."""
        met = self._met()
        return sum(c > n for c, n in met), len(met)

    @property
    def beyond_noise(self) -> tuple[int, int]:
        """In how many epochs the pair was found in conflict, by the study's test or else by its rate, and how many there were."""
        return self.epochs_above if self.tested is None else (sum(self.tested), len(self.tested))

    @property
    def reading(self) -> Effect:
        """What to make of the pair: the study's own test where it was made, the comparison of rates otherwise."""
        if self.tested and any(self.tested):
            return TESTED if self.tested[-1] else EARLIER
        if self.excess is None or self.cosine is None:
            return NO_NULL
        if self.cosine >= 0:
            return ALIGNED
        above, seen = self.epochs_above
        return CONFLICT if self.tested is None and self.excess > 0 and 2 * above > seen else NOISE

    def _met(self) -> list[tuple[float, float]]:
        return [(c, n) for c, n in zip(self.conflict, self.null, strict=True) if c is not None and n is not None]


def pairs(results: Results) -> list[Pair]:
    """All pairs of tasks, the one with most conflict beyond the null first; empty where nothing was observed."""
    seen = results.get("interference") or {}
    K, epochs = len(seen.get("tasks") or ()), range(len(seen.get("epochs") or ()))
    found = [_pair(seen, i, j, epochs) for i in range(K) for j in range(i + 1, K)] if epochs else []
    return sorted(found, key=lambda p: -(p.excess if p.excess is not None else -2.0))


def _pair(seen: Mapping[str, Any], i: int, j: int, epochs: range) -> Pair:
    conflicting = seen.get("conflicting")
    return Pair(
        seen["tasks"][i],
        seen["tasks"][j],
        mean_of(entry(seen, "cosine", e, i, j) for e in epochs),
        tuple(entry(seen, "conflict_rate", e, i, j) for e in epochs),
        tuple(mean_of(entry(seen, "null_conflict_rate", e, k) for k in (i, j)) for e in epochs),
        None if conflicting is None else tuple({i, j} in map(set, found or ()) for found in conflicting),
    )


def entry(part: Mapping[str, Any], key: str, *index: int) -> float | None:
    """One number out of nested lists, None where any level is absent."""
    found: Any = part.get(key)
    for i in index:
        if found is None or i >= len(found):
            return None
        found = found[i]
    return finite(found)

"""What the report of a comparison of merging methods reads out of its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytask.errors import InputError
from polytask.report.numbers import MISSING, finite
from polytask.report.reading import GAINS, LOSES, UNCLEAR, UNKNOWN, Effect, Interval, Results, falling, interval

BASELINE = "task_arithmetic"
FEW = 10
"""Lineages that say little of how far lineages differ are fewer than these."""


def check_merges(results: Results) -> None:
    """Refuse what is not a comparison of merging methods.

    Raises:
        InputError: it is something else, or of a schema that is not known.
    """
    if results.get("kind") != "merge comparison" or results.get("schema") != 1:
        raise InputError("these are not the results of  polytask merge compare, schema 1")


def ranked(results: Results) -> list[Mapping[str, Any]]:
    """All candidates, the highest normalised accuracy on test rows first."""
    return sorted(results["candidates"], key=lambda c: falling(interval(c["normalised"]).mean))


def distinct(results: Results) -> list[Mapping[str, Any]]:
    """The same without those whose test results are another's; what was chosen stays."""
    return [c for c in ranked(results) if not c.get("same_as") or c["name"] == results["verdict"]["method"]]


def repeated(results: Results) -> list[str]:
    """A sentence for each method that others repeat on the test rows."""
    shown = {c["name"] for c in distinct(results)}
    twins: dict[str, list[str]] = {}
    for c in ranked(results):
        if c["name"] not in shown:
            twins.setdefault(str(c["same_as"]), []).append(str(c["label"]))
    labels = {c["name"]: c["label"] for c in results["candidates"]}
    return [
        f"Test results the same as those of {labels[n]}, row for row, and no row of their own: {', '.join(those)}."
        for n, those in twins.items()
    ]


def effect_of(candidate: Mapping[str, Any]) -> Effect:
    """Whether a candidate is told apart from task arithmetic, and which way."""
    found = interval(candidate["difference"])
    if candidate["name"] == BASELINE or found.low is None or found.high is None:
        return UNKNOWN
    return UNCLEAR if found.low <= 0 <= found.high else GAINS if found.low > 0 else LOSES


def points(found: Interval) -> Interval:
    """The same in points of a hundred."""
    return Interval(*(None if x is None else 100 * x for x in found))


def lineages(results: Results) -> int:
    """How many: as many as seeds, unless these are draws of the random methods on one."""
    return int(results.get("lineages") or len(results["budget"]["seeds"]))


def ahead_in(results: Results, candidate: Mapping[str, Any]) -> str:
    """In how many lineages a candidate is ahead of task arithmetic; empty where there is one, or it was not kept."""
    by_seed = candidate.get("difference_by_seed") or ()
    if lineages(results) < len(by_seed) or len(by_seed) < 2 or candidate["name"] == BASELINE:
        return ""
    return f"{sum((finite(x) or 0) > 0 for x in by_seed)} of {len(by_seed)}"


def covered(results: Results) -> str:
    """What intervals cover, and what they do not."""
    seeds, count = len(results["budget"]["seeds"]), lineages(results)
    if count == 1:
        what = "test rows" if seeds == 1 else f"test rows and {seeds} seeds of the random methods"
        return f"Intervals cover {what} on one lineage: they say nothing of other fine-tunings."
    rough = f": they are rough, as {count} lineages say little of how far lineages differ" if count < FEW else ""
    return f"Intervals cover test rows and {count} lineages{rough}."


def settings(candidate: Mapping[str, Any]) -> list[str]:
    """Each searched option with what was chosen: one value a seed in their order, of equal ones one with their number."""
    tried = [trial["options"] for seed in candidate["tried"] for trial in seed]
    values: dict[str, set[str]] = {}
    for options in tried:
        for name, value in options.items():
            values.setdefault(name, set()).add(str(value))
    return [
        f"{name} {_by_seed([_short(chosen.get(name)) for chosen in candidate['chosen']])}"
        for name, found in values.items()
        if len(found) > 1
    ]


def _by_seed(values: list[str]) -> str:
    alike = len(set(values)) == 1
    return (f"{values[0]} ×{len(values)}" if len(values) > 1 else values[0]) if alike else " / ".join(values)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def whole_seconds(candidate: Mapping[str, Any]) -> float:
    """What a merge takes with the statistics it needs."""
    return float(candidate["seconds"]) + float(candidate["statistic_seconds"])


def size(count: Any) -> str:
    """Bytes for people; nothing seen above what the process held anyway is not nothing needed."""
    value = finite(count)
    if value is None:
        return MISSING
    if not value:
        return "–"
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"

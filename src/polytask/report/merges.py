"""The report of a comparison of merging methods: one page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.errors import InputError
from polytask.report.markup import Markup, join, section, tag
from polytask.report.matrix import colour_scale, matrix_map
from polytask.report.numbers import MISSING, bracket, duration, finite, plain
from polytask.report.page import document, put
from polytask.report.reading import GAINS, LOSES, UNCLEAR, UNKNOWN, Effect, Interval, Results, falling, interval
from polytask.report.strips import axis_around_zero, axis_labels, strip, ticks_of

CONTENTS = ("results", "methods", "tasks", "interference", "cost", "budget")
BASELINE = "task_arithmetic"
OF_METHODS = (
    "Normalised accuracy is the mean over tasks of a model's accuracy divided by the expert's. The drawn difference is to task arithmetic, "
    "in points, with its 95 % interval over test rows{seeds}; every method was tuned on validation rows alone."
)
OF_TASKS = "Accuracy on test rows in percent; the stronger the blue, the nearer to the expert."
OF_COSINES = (
    "The cosine of two task vectors: near 0 they change the base in unrelated ways, below 0 they undo one another."
)
OF_SIGNS = "Share of the entries that both task vectors move in which they move apart: 0.5 for unrelated ones."
OF_SUBSPACES = "How much of the leading directions of one task vector lies among those of the other: 1 for the same, {chance} by chance."


def write_merge_html(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the report of a comparison of merging methods as one file that loads nothing.

    Args:
        results: what :func:`~polytask.training.merges.compare` returns.
        path: the file to write, by convention ``report.html`` in the comparison's folder.

    Raises:
        InputError: the results are of something else.
        StorageError: the file cannot be written; an older report is left as it was.
    """
    target = Path(path)
    return put(merge_page(results, target.resolve().parent.name), target)


def merge_page(results: Results, run: str = "DIR") -> str:
    """The report as text.

    Args:
        results: what :func:`~polytask.training.merges.compare` returns.
        run: the folder's name, as the commands on the page name it.

    Raises:
        InputError: the results are of something else.
    """
    check_merges(results)
    parts = (
        _verdict(results),
        _methods(results),
        _tasks(results),
        _interference(results),
        _cost(results),
        _budget(results, run),
    )
    return document(
        tag("main", *parts),
        CONTENTS,
        f"merging {len(results['tasks'])} experts",
        f"polytask: {run}",
        str(results["polytask"]),
    )


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


def effect_of(candidate: Mapping[str, Any]) -> Effect:
    """Whether a candidate is told apart from task arithmetic, and which way."""
    found = interval(candidate["difference"])
    if candidate["name"] == BASELINE or found.low is None or found.high is None:
        return UNKNOWN
    return UNCLEAR if found.low <= 0 <= found.high else GAINS if found.low > 0 else LOSES


def points(found: Interval) -> Interval:
    """The same in points of a hundred."""
    return Interval(*(None if x is None else 100 * x for x in found))


def _of(results: Results, name: str) -> Mapping[str, Any]:
    return next(c for c in results["candidates"] if c["name"] == name)


def _verdict(results: Results) -> Markup:
    said = results["verdict"]
    first, *rest = str(said["text"]).split(". ")
    shown = dict.fromkeys([said["method"], BASELINE, "base", "experts"])
    tiles = tag("div", *(_tile(_of(results, name)) for name in shown), class_="tiles")
    more = tag("p", ". ".join(rest)) if rest else None
    return section("results", "What came of it", tag("h1", first.rstrip(".") + "."), more, tiles)


def _tile(candidate: Mapping[str, Any]) -> Markup:
    mean, low, high = points(interval(candidate["normalised"]))
    by = points(interval(candidate["mean_accuracy"])).mean
    spread = "" if candidate["name"] == "experts" else f"{bracket(low, high, 1)} of the experts; "
    return tag(
        "dl",
        tag("dt", candidate["label"]),
        tag("dd", f"{plain(mean, 1)} %", class_="value"),
        tag("dd", f"{spread}mean accuracy {plain(by, 1)} %"),
    )


def _methods(results: Results) -> Markup:
    rows = ranked(results)
    axis = axis_around_zero([points(interval(c["difference"])) for c in rows if c["name"] != "experts"])
    ticks = ticks_of(axis)
    head = _head("Method", "Normalised accuracy", "Against task arithmetic →", "", "Chosen on validation")
    body = []
    for c in rows:
        difference, effect = points(interval(c["difference"])), effect_of(c)
        title = f"{c['label']}: {plain(difference.mean, 1, sign=True)} points {bracket(difference.low, difference.high, 1, sign=True)}"
        # a reference may lie far off the stretch that tells methods apart: its number stands beside
        off = c["role"] == "reference" and axis.beyond(difference.mean or 0.0)
        lanes = [] if off else [(difference, effect.style)]
        drawn = strip(lanes, axis, title, 30, ticks)
        chosen = tag("span", "chosen", class_="tagged") if c["name"] == results["verdict"]["method"] else None
        body.append(
            tag(
                "tr",
                tag("th", c["label"], chosen, tag("small", c["role"]), scope="row"),
                _percent_cell(points(interval(c["normalised"])), "Normalised accuracy"),
                tag("td", drawn, class_="drawn"),
                tag(
                    "td",
                    f"{effect.symbol} {plain(difference.mean, 1, sign=True)}",
                    class_=f"number effect {effect.style}",
                    data_label="Points",
                ),
                tag("td", _settings(c), class_="classes", data_label="Chosen on validation"),
                class_="chosen" if chosen else None,
            )
        )
    foot = tag(
        "tfoot", tag("tr", tag("td", colspan=2), tag("td", axis_labels(axis, ""), class_="drawn"), tag("td", colspan=2))
    )
    several = (
        " and seeds"
        if len(results["budget"]["seeds"]) > 1
        else "; there is one seed, so that it says nothing of other fine-tunings"
    )
    left = results.get("left_out") or ()
    out = (
        tag(
            "details",
            tag("summary", f"{len(left)} methods took no part"),
            _facts({x["name"]: x["reason"] for x in left}),
        )
        if left
        else None
    )
    note = tag("p", OF_METHODS.format(seeds=several), class_="note")
    return section(
        "methods",
        "Methods, under one budget",
        note,
        tag("table", head, tag("tbody", *body), foot, class_="cards methods"),
        out,
    )


def _head(*titles: str) -> Markup:
    return tag("thead", tag("tr", *(tag("th", t, scope="col") for t in titles)))


def _percent_cell(found: Interval, label: str) -> Markup:
    value = MISSING if found.mean is None else f"{plain(found.mean, 1)} %"
    return tag(
        "td", tag("b", value), tag("small", bracket(found.low, found.high, 1)), class_="number", data_label=label
    )


def _settings(candidate: Mapping[str, Any]) -> str:
    said = [", ".join(f"{n} {_short(v)}" for n, v in chosen.items()) for chosen in candidate["chosen"]]
    return "; ".join(dict.fromkeys(s for s in said if s)) or "nothing to choose"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tasks(results: Results) -> Markup:
    names = [t["name"] for t in results["tasks"]]
    experts = {n: interval(_of(results, "experts")["accuracy"][n]).mean or 1.0 for n in names}
    body = []
    for c in ranked(results):
        cells = []
        for n in names:
            found = points(interval(c["accuracy"][n]))
            part = (found.mean or 0.0) / (100 * experts[n])
            # linear colour would make 60 % and 100 % look alike
            shade = f"background:color-mix(in srgb, var(--agree) {round(75 * min(1.0, part) ** 4)}%, transparent)"
            shown = bracket(found.low, found.high, 1)
            cells.append(
                tag(
                    "td",
                    plain(found.mean, 1),
                    title=f"{c['label']}, {n}: {plain(found.mean, 1)} % {shown}",
                    class_="number",
                    style=shade,
                )
            )
        body.append(tag("tr", tag("th", c["label"], scope="row"), *cells))
    table = tag("table", _head("Method", *names), tag("tbody", *body), class_="wide")
    return section(
        "tasks", "Accuracy per task", tag("p", OF_TASKS, class_="note"), tag("div", table, class_="scroll", tabindex=0)
    )


def _interference(results: Results) -> Markup:
    found = results["interference"]
    names = found["tasks"]
    if len(names) < 2:
        return section(
            "interference", "Interference between task vectors", tag("p", "There is one expert only.", class_="nothing")
        )
    between = [c for i, row in enumerate(found["cosine"]) for j, c in enumerate(row) if i != j]
    limit = max(0.05, *(abs(c) for c in between))
    maps = [
        _map(names, found["cosine"], limit, "Cosine", OF_COSINES, colour_scale(limit)),
        _map(names, found["opposed"], 0.7, "Opposed signs", OF_SIGNS),
        _map(
            names,
            found["overlap"],
            1.0,
            "Shared leading directions",
            OF_SUBSPACES.format(chance=plain(found["chance"], 2)),
        ),
    ]
    lengths = _facts({n: plain(x, 3) for n, x in zip(names, found["norm"], strict=True)})
    norms = tag("details", tag("summary", "Lengths of the task vectors"), lengths)
    return section("interference", "Interference between task vectors", tag("div", *maps, class_="maps beside"), norms)


def _map(
    names: Sequence[str],
    cells: Sequence[Sequence[float]],
    limit: float,
    title: str,
    note: str,
    scale: Markup | None = None,
) -> Markup:
    drawn = matrix_map(
        names,
        cells,
        limit,
        title=f"{title} between task vectors",
        described="The same numbers stand in results.json.",
        meaning=lambda i, j: f"{names[i]} and {names[j]}",
    )
    return tag(
        "figure", tag("h3", title), tag("figcaption", note), tag("div", drawn, class_="scroll", tabindex=0), scale
    )


def _cost(results: Results) -> Markup:
    rows = [c for c in results["candidates"] if c["role"] != "reference"]
    longest = max((whole_seconds(c) for c in rows), default=0.0) or 1.0
    body = [
        tag(
            "tr",
            tag("th", c["label"], scope="row"),
            tag("td", duration(c["seconds"]), class_="number", data_label="One merge"),
            tag(
                "td",
                duration(c["statistic_seconds"]) if c["statistic_seconds"] else "–",
                class_="number",
                data_label="Statistics",
            ),
            tag("td", size(c["peak_bytes"]), class_="number", data_label="Peak memory"),
            tag(
                "td",
                tag("span", class_="bar-fill", style=f"width:{100 * whole_seconds(c) / longest:.1f}%"),
                class_="bar-cell",
            ),
        )
        for c in sorted(rows, key=whole_seconds)
    ]
    note = (
        "Seconds of one merge in memory with the chosen setting, and of gathering the statistics that a method needs; the bar adds both. "
        "Peak memory is above what the process held before, and small models hide in what it had left over (–)."
    )
    table = tag(
        "table", _head("Method", "One merge", "Statistics", "Peak memory", ""), tag("tbody", *body), class_="cards bars"
    )
    return section("cost", "What it cost", tag("p", note, class_="note"), table)


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


def _budget(results: Results, run: str) -> Markup:
    budget = results["budget"]
    facts = {
        "Settings tried, at most": budget["trials"],
        "Inputs a task for statistics": budget["proxy_rows"],
        "Seeds": ", ".join(map(str, budget["seeds"])),
        "Do it again": tag("code", f"polytask merge compare CONFIG.yml --out {shlex.quote(run)}"),
    }
    rows = [
        tag(
            "tr",
            tag("th", t["name"], scope="row"),
            *(tag("td", plain(t[p], 0), class_="number", data_label=p) for p in ("validation", "test")),
        )
        for t in results["tasks"]
    ]
    table = tag("table", _head("Task", "Validation rows", "Test rows"), tag("tbody", *rows), class_="cards")
    where = tag("p", "Every number of this page stands in ", tag("code", "results.json"), " beside it.", class_="note")
    return section("budget", "Data and budget", _facts(facts), table, where)


def _facts(facts: Mapping[str, object]) -> Markup:
    return tag("dl", *(join(tag("dt", what), tag("dd", value)) for what, value in facts.items()), class_="facts")

"""Every merging method of a comparison in one row: how it did beside task arithmetic, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polytask.report.markup import Markup, join, section, tag
from polytask.report.merges_reading import (
    ahead_in,
    covered,
    distinct,
    effect_of,
    points,
    ranked,
    repeated,
    settings,
    size,
    whole_seconds,
)
from polytask.report.numbers import MISSING, bracket, duration, plain
from polytask.report.reading import Interval, Results, interval
from polytask.report.strips import Axis, axis_labels, axis_of_most, labels, strip, ticks_of

OF_METHODS = (
    "Normalised accuracy is the mean over tasks of a model's accuracy divided by the expert's. Drawn is the difference to task "
    "arithmetic in points, with its 95 % interval; what lies off the axis has an arrow and its number. Every method was tuned on "
    "validation rows alone."
)
OF_COST = (
    "Seconds of one merge in memory with the chosen setting, and of gathering the statistics that a method needs; the dot adds both, on "
    "a logarithmic axis. Peak memory is above what the process held before, and small models hide in what it had left over (–)."
)
AGAINST = "Against task arithmetic →"
AHEAD = "Ahead in lineages"
TICKS = 8
CHOSEN = "Chosen on validation"


def methods(results: Results) -> Markup:
    """All candidates but those that repeat another's test results, the best on test rows first."""
    rows = distinct(results)
    others = [c for c in rows if c["role"] not in ("reference", "baseline")]
    axis = axis_of_most(points(interval(c["difference"])) for c in others)
    seeds = results["budget"]["seeds"]
    order = tag("small", f"in the order of seeds {', '.join(map(str, seeds))}") if len(seeds) > 1 else None
    several = any(ahead_in(results, c) for c in rows)
    chosen = join(CHOSEN, order)
    head = heads(
        "Method",
        "Normalised accuracy",
        join(AGAINST, axis_labels(axis, "", TICKS)),
        "Points",
        *([AHEAD] if several else []),
        chosen,
    )
    body = [_row(results, c, axis, several) for c in rows]
    drawn = tag("td", axis_labels(axis, "", TICKS), class_="drawn")
    foot = tag("tfoot", tag("tr", tag("td", colspan=2), drawn, tag("td", colspan=2 + several)))
    return section(
        "methods",
        "Methods, under one budget",
        tag("p", f"{OF_METHODS} {covered(results)}", class_="note"),
        *(tag("p", said, class_="note") for said in repeated(results)),
        tag("table", head, tag("tbody", *body), foot, class_="cards methods merged"),
        _left_out(results),
    )


def _row(results: Results, c: Mapping[str, Any], axis: Axis, several: bool) -> Markup:
    difference, effect = points(interval(c["difference"])), effect_of(c)
    spread = bracket(difference.low, difference.high, 1, sign=True)
    title = f"{c['label']}: {plain(difference.mean, 1, sign=True)} points {spread}"
    drawn = strip([(difference, effect.style)], axis, title, 34, ticks_of(axis, TICKS))
    is_chosen = c["name"] == results["verdict"]["method"]
    chosen = tag("span", "chosen", class_="tagged") if is_chosen else None
    return tag(
        "tr",
        tag("th", name_of(c), tag("small", chosen, c["role"]), scope="row"),
        _percent_cell(points(interval(c["normalised"])), "Normalised accuracy"),
        tag("td", drawn, class_="drawn"),
        tag(
            "td",
            tag("span", f"{effect.symbol} {plain(difference.mean, 1, sign=True)}", class_=f"effect {effect.style}"),
            tag("small", spread),
            class_="number",
            data_label="Points",
        ),
        tag("td", ahead_in(results, c), class_="number", data_label=AHEAD) if several else None,
        tag(
            "td",
            *(tag("div", said) for said in settings(c) or ["nothing searched"]),
            class_="classes",
            data_label=CHOSEN,
        ),
        class_="chosen" if is_chosen else None,
    )


def _percent_cell(found: Interval, label: str) -> Markup:
    value = MISSING if found.mean is None else f"{plain(found.mean, 1)} %"
    return tag(
        "td", tag("b", value), tag("small", bracket(found.low, found.high, 1)), class_="number", data_label=label
    )


def _left_out(results: Results) -> Markup | None:
    left = results.get("left_out") or ()
    if not left:
        return None
    summary = tag("summary", f"{len(left)} methods took no part")
    return tag("details", summary, facts({x["name"]: x["reason"] for x in left}))


def cost(results: Results) -> Markup:
    """Seconds and memory of all but the references, the fastest first."""
    rows = sorted((c for c in ranked(results) if c["role"] != "reference"), key=whole_seconds)
    taken = [math.log10(s) for c in rows if (s := whole_seconds(c)) > 0] or [0.0]
    axis = Axis(math.floor(min(taken)), max(math.ceil(max(taken)), math.floor(min(taken)) + 1))
    decades = range(int(axis.low), int(axis.high) + 1)
    scale = labels([(d, f"{10.0**d:g} s") for d in decades], axis)
    body = [
        tag(
            "tr",
            tag("th", name_of(c), scope="row"),
            tag("td", duration(c["seconds"]), class_="number", data_label="One merge"),
            tag(
                "td",
                duration(c["statistic_seconds"]) if c["statistic_seconds"] else "–",
                class_="number",
                data_label="Statistics",
            ),
            tag("td", size(c["peak_bytes"]), class_="number", data_label="Peak memory"),
            tag("td", _dot(c, axis, decades), class_="drawn"),
        )
        for c in rows
    ]
    head = heads("Method", "One merge", "Statistics", "Peak memory", scale)
    foot = tag("tfoot", tag("tr", tag("td", colspan=4), tag("td", scale, class_="drawn")))
    table = tag("table", head, tag("tbody", *body), foot, class_="cards bars merged")
    return section("cost", "What it cost", tag("p", OF_COST, class_="note"), table)


def _dot(c: Mapping[str, Any], axis: Axis, decades: range) -> Markup:
    seconds = whole_seconds(c)
    place = Interval(math.log10(seconds) if seconds > 0 else None, None, None)
    return strip([(place, "accent")], axis, f"{c['label']}: {duration(seconds)}", 20, decades, zero=False)


def name_of(c: Mapping[str, Any]) -> Markup:
    """The label, which may be broken after an underscore and nowhere else within a word."""
    first, *rest = str(c["label"]).split("_")
    return join(first, *(join("_", tag("wbr"), part) for part in rest))


def heads(*titles: object) -> Markup:
    """The first row of a table."""
    return tag("thead", tag("tr", *(tag("th", t, scope="col") for t in titles)))


def facts(found: Mapping[str, object]) -> Markup:
    """Terms and what there is to say of each."""
    return tag("dl", *(join(tag("dt", what), tag("dd", value)) for what, value in found.items()), class_="facts")

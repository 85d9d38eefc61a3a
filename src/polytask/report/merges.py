"""The report of a comparison of merging methods: one page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.report.markup import Markup, section, tag
from polytask.report.matrix import colour_scale, matrix_map
from polytask.report.merges_methods import cost, facts, heads, methods, name_of
from polytask.report.merges_reading import BASELINE, check_merges, distinct, points
from polytask.report.numbers import bracket, plain
from polytask.report.page import document, put
from polytask.report.reading import Results, interval

CONTENTS = ("results", "methods", "tasks", "interference", "cost", "budget")
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
        methods(results),
        _tasks(results),
        _interference(results),
        cost(results),
        _budget(results, run),
    )
    return document(
        tag("main", *parts),
        CONTENTS,
        f"merging {len(results['tasks'])} experts",
        f"polytask: {run}",
        str(results["polytask"]),
    )


def _of(results: Results, name: str) -> Mapping[str, Any]:
    return next(c for c in results["candidates"] if c["name"] == name)


def _verdict(results: Results) -> Markup:
    verdict = results["verdict"]
    first, *rest = str(verdict["text"]).split(". ")
    shown = dict.fromkeys([verdict["method"], BASELINE, "base", "experts"])
    tiles = tag("div", *(_tile(_of(results, name)) for name in shown), class_="tiles")
    more = tag("ul", *(tag("li", said.rstrip(".") + ".") for said in rest), class_="reasons") if rest else None
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


def _tasks(results: Results) -> Markup:
    names = [t["name"] for t in results["tasks"]]
    experts = {n: interval(_of(results, "experts")["accuracy"][n]).mean or 1.0 for n in names}
    body = []
    for c in distinct(results):
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
        body.append(tag("tr", tag("th", name_of(c), scope="row"), *cells))
    table = tag("table", heads("Method", *names), tag("tbody", *body), class_="wide")
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
    lengths = facts({n: plain(x, 3) for n, x in zip(names, found["norm"], strict=True)})
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


def _budget(results: Results, run: str) -> Markup:
    budget = results["budget"]
    said = {
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
    table = tag("table", heads("Task", "Validation rows", "Test rows"), tag("tbody", *rows), class_="cards")
    where = tag("p", "Every number of this page stands in ", tag("code", "results.json"), " beside it.", class_="note")
    return section("budget", "Data and budget", facts(said), table, where)

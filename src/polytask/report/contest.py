"""A benchmark of methods: the page with every method drawn, and the table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from polytask.report import comparison, context
from polytask.report.markup import Markup, section, tag
from polytask.report.numbers import bracket, finite, percent, plain
from polytask.report.page import document, put
from polytask.report.reading import Interval, Results, check, delta_m, interval, label_of, ranked_methods
from polytask.report.strips import axis_around_zero, axis_labels, strip, ticks_of
from polytask.report.tables import Sheet, framed

CONTENTS = ("findings", "differences", "methods", "results", "data")
SCALARIZATION = "scalarization"
OF_DIFFERENCES = (
    "Δm over tasks on the test rows minus that of the tuned scalarization, in percentage points, right is better. The intervals "
    "hold for all rows at once with 95 %: where one crosses the line, these data cannot tell the two apart."
)


def write_contest_html(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the page of a benchmark of methods.

    Args:
        results: what stands in its ``results.json``.
        path: the file to write.

    Returns:
        The path written.

    Raises:
        InputError: the results are not those of a benchmark.
        StorageError: the file cannot be written; an older page is left as it was.
    """
    check(results)
    source = (results.get("data") or {}).get("source")
    main = tag(
        "main",
        findings(results),
        differences(results),
        comparison.methods(results),
        comparison.results_table(results),
        context.data_and_budget(results),
    )
    title = f"polytask bench: {source or 'methods'}"
    return put(document(main, CONTENTS, source, title, str(results.get("polytask", ""))), Path(path))


def findings(results: Results) -> Markup:
    """What can be told apart, in sentences, and what was left out."""
    said = _sentences(results)
    left_out = [f"{s['name']} {s['reason']}" for s in results.get("skipped") or ()]
    return tag(
        "section",
        tag("h1", f"{len(results['methods'])} ways of learning the same tasks, under one budget"),
        tag("ul", *(tag("li", s) for s in said), class_="reasons"),
        tag("p", f"Left out: {'; '.join(left_out)}.", class_="note") if left_out else None,
        id="findings",
    )


def differences(results: Results) -> Markup:
    """Every row against the tuned scalarization, drawn."""
    found = _against(results, SCALARIZATION)
    shown = [(m, found[m["name"]]) for m in ranked_methods(results) if m.get("name") in found]
    axis = axis_around_zero([i for _, i in shown])
    head = tag("thead", tag("tr", *(tag("th", t, scope="col") for t in ("Method", "Difference", "← worse, better →"))))
    rows = []
    for method, i in shown:
        label = method.get("label") or method.get("name")
        style = "even" if i.low is None or i.high is None or i.low <= 0 <= i.high else "gain" if i.low > 0 else "lose"
        value = tag("td", tag("b", plain(i.mean, 2, sign=True)), tag("small", bracket(i.low, i.high, 2, sign=True)))
        drawn = tag("td", strip([(i, style)], axis, f"{label}: {percent(i.mean)}", 26, ticks_of(axis)), class_="drawn")
        rows.append(tag("tr", tag("th", label, scope="row"), value, drawn))
    foot = tag("tfoot", tag("tr", tag("td", colspan=2), tag("td", axis_labels(axis, ""), class_="drawn")))
    table = tag("table", head, tag("tbody", *rows), foot, class_="cards methods")
    return section("differences", "Against tuned scalarization", tag("p", OF_DIFFERENCES, class_="note"), table)


def contest_table(results: Results) -> Sheet:
    """Every row, the best first: both Delta_m with intervals, the difference to the tuned scalarization, rank, seconds.

    Raises:
        InputError: the results are not those of a benchmark.
    """
    check(results)
    return Sheet(lambda width: Group(_table(results, width), _told(results)))


def _told(results: Results) -> Any:
    lines = [Text(f"- {s}") for s in _sentences(results)]
    lines += [Text(f"- Left out: {s['name']} {s['reason']}.") for s in results.get("skipped") or ()]
    lines.append(Text(str((results.get("budget") or {}).get("text") or ""), style="dim"))
    return framed("What can be told apart", *lines)


def _table(results: Results, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), width=width, caption_justify="left")
    table.caption = Text(
        "Delta_m: percent better than single-task models, with 95 % intervals. vs tuned: minus the tuned scalarization; "
        "▲ ▼ better, worse for all comparisons at once."
    )
    table.add_column("Method", ratio=1, overflow="ellipsis", no_wrap=True, min_width=12)
    for head in ("Delta_m tasks", "metrics", "vs tuned", "Rank", "Seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    against = _against(results, SCALARIZATION)
    for method in ranked_methods(results):
        i = delta_m(method, "tasks")
        gain = f"{plain(i.mean, 1, sign=True)} {bracket(i.low, i.high, 1, sign=True)}".strip()
        table.add_row(
            Text(
                str(method.get("label") or method.get("name")), style="bold" if method.get("role") != "method" else ""
            ),
            "0" if method.get("role") == "reference" else gain,
            "0" if method.get("role") == "reference" else plain(method.get("delta_m_metrics"), 1, sign=True),
            _difference(against.get(str(method.get("name")))),
            plain(method.get("mean_rank"), 1),
            plain(method.get("seconds"), 1),
        )
    return table


def _difference(found: Interval | None) -> Text:
    if found is None or found.mean is None:
        return Text("")
    sure = found.low is not None and found.high is not None and not found.low <= 0 <= found.high
    sign, style = (" ", "dim") if not sure else ("▲", "green") if found.mean > 0 else ("▼", "red")
    return Text(f"{plain(found.mean, 1, sign=True)} {sign}", style=style)


def _against(results: Results, baseline: str) -> dict[str, Interval]:
    """{method: its difference to the baseline}."""
    found: Mapping[str, Any] = ((results.get("comparison") or {}).get("against") or {}).get(baseline) or {}
    return {name: interval(i) for name, i in found.items() if finite(i.get("mean")) is not None}


def _sentences(results: Results) -> list[str]:
    said = list((results.get("comparison") or {}).get("sentences") or ())
    chosen = results["verdict"].get("method")
    if chosen:
        said.append(
            f"On validation rows the simplest row within one standard error of the best is {label_of(results, chosen)}."
        )
    return said

"""What stands around the results: groupings considered, data and budget, cost, and the commands that do it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from polytask.report.markup import Markup, join, section, tag
from polytask.report.numbers import duration, finite, percent, plain, share
from polytask.report.reading import Results, falling, label_of
from polytask.report.verdict import group_boxes

TABLE_FILE = re.compile(r"\.(csv|tsv|txt|parquet|pq|feather|arrow)(\.\w+)?$", re.IGNORECASE)
GROUPINGS_SHOWN, LABEL_PARTS = 12, ("train", "validation", "test")


def groupings(results: Results) -> Markup:
    """Which ways of grouping the tasks were weighed."""
    found = results.get("grouping") or {}
    candidates = sorted(found.get("candidates") or (), key=lambda c: falling(c.get("validation_score")))
    if not candidates:
        nothing = tag("p", "No grouping of the tasks was weighed in this run.", class_="nothing")
        return section("groupings", "Groupings considered", nothing)
    chosen = _as_sets(results["verdict"].get("groups") or ())
    rows = [_grouping_row(c, _as_sets(c["groups"]) == chosen) for c in candidates]
    how = tag("p", f"How: {found['how']}", class_="note") if found.get("how") else None
    first, rest = rows[:GROUPINGS_SHOWN], rows[GROUPINGS_SHOWN:]
    more = tag("details", tag("summary", f"The other {len(rest)} groupings"), _groupings_table(rest)) if rest else None
    return section("groupings", "Groupings considered", how, _groupings_table(first), more)


def _as_sets(groups: Sequence[Sequence[str]]) -> set[frozenset[str]]:
    return {frozenset(g) for g in groups}


def _groupings_table(rows: Sequence[Markup]) -> Markup:
    titles = ("Groups of tasks, a model each", "Validation score", "Δm over tasks, test")
    head = tag("thead", tag("tr", *(tag("th", t, scope="col") for t in titles)))
    return tag("table", head, tag("tbody", *rows), class_="cards groupings")


def _grouping_row(candidate: Mapping[str, Any], chosen: bool) -> Markup:
    score, delta = plain(candidate.get("validation_score"), 2, sign=True), percent(candidate.get("delta_m_tasks"), 2)
    mark = tag("span", "chosen", class_="tagged") if chosen else None
    return tag(
        "tr",
        tag("td", group_boxes(candidate["groups"]), mark, class_="boxes"),
        tag("td", score, class_="number", data_label="Validation score"),
        tag("td", delta, class_="number", data_label="Δm over tasks, test"),
        class_="chosen" if chosen else None,
    )


def data_and_budget(results: Results) -> Markup:
    """What was learnt from, how it was split, and what every method was given."""
    data, budget = results.get("data") or {}, results.get("budget") or {}
    split = data.get("split") or {}
    parts = ", ".join(f"{plain(split[p], 0)} {p}" for p in LABEL_PARTS if split.get(p) is not None)
    facts = {
        "Source": data.get("source"),
        "Rows": plain(data["rows"], 0) if data.get("rows") is not None else None,
        "Split": f"{parts} ({split['how']})" if split.get("how") else parts,
        "Features": ", ".join(f"{n} {kind}" for kind, n in (data.get("features") or {}).items() if n),
        "Seeds": ", ".join(map(str, budget.get("seeds") or ())),
        "Epochs, at most": budget.get("epochs"),
        "Trials": budget.get("trials"),
        "Budget": budget.get("text"),
    }
    columns = data.get("columns") or ()
    names = tag(
        "details", tag("summary", f"The {len(columns)} feature columns"), tag("p", ", ".join(map(str, columns)))
    )
    return section("data", "Data and budget", _facts(facts), _labels(results), names if columns else None)


def _facts(facts: Mapping[str, object]) -> Markup:
    listed = (join(tag("dt", what), tag("dd", value)) for what, value in facts.items() if value not in (None, ""))
    return tag("dl", *listed, class_="facts")


def _labels(results: Results) -> Markup:
    missing = (results.get("data") or {}).get("missing") or {}
    titles = ("Task", "Kind", *(f"Labels, {p}" for p in LABEL_PARTS), "Missing", "Classes")
    rows = [_labels_row(task, missing.get(task["name"])) for task in results["tasks"]]
    head = tag("thead", tag("tr", *(tag("th", t, scope="col") for t in titles)))
    return tag("table", head, tag("tbody", *rows), class_="cards")


def _labels_row(task: Mapping[str, Any], missing: object) -> Markup:
    counts = [(p, (task.get("labels") or {}).get(p)) for p in LABEL_PARTS]
    return tag(
        "tr",
        tag("th", task["name"], scope="row"),
        tag("td", task.get("kind", ""), data_label="Kind"),
        *(tag("td", plain(n, 0), class_="number", data_label=f"Labels, {p}") for p, n in counts),
        tag("td", share(missing), class_="number", data_label="Missing"),
        tag("td", ", ".join(map(str, task.get("classes") or ())) or "–", class_="classes", data_label="Classes"),
    )


def cost(results: Results) -> Markup:
    """What the run and each method cost in time."""
    found = results.get("cost") or {}
    alone, joint = finite(found.get("single_task_seconds")), finite(found.get("joint_seconds"))
    said = [f"The whole run took {duration(found['seconds'])}."] if finite(found.get("seconds")) is not None else []
    if alone and joint:
        said.append(
            f"The joint model trains in {duration(joint)}, the single-task models together in {duration(alone)}:"
        )
        said.append(f"{alone / joint:.1f} times as long.")
    seconds = {name: s for name, value in (found.get("by_method") or {}).items() if (s := finite(value)) is not None}
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = [_cost_row(label_of(results, n), s, s / longest) for n, s in sorted(seconds.items(), key=lambda i: i[1])]
    table = tag("table", tag("tbody", *rows), class_="bars") if rows else None
    return section("cost", "What it cost", tag("p", " ".join(said)) if said else None, table)


def _cost_row(label: str, seconds: float, part: float) -> Markup:
    bar = tag("span", class_="bar-fill", style=f"width:{100 * part:.1f}%")
    return tag(
        "tr",
        tag("th", label, scope="row"),
        tag("td", duration(seconds), class_="number"),
        tag("td", bar, class_="bar-cell"),
    )


def replay(results: Results, run: str) -> Markup:
    """The commands that use this run or do it again."""
    folder, source = shlex.quote(run), str((results.get("data") or {}).get("source") or "")
    table = shlex.quote(source) if TABLE_FILE.search(source) else "DATA"
    commands = {
        "Predict with the model": f"polytask predict {folder} NEW.csv",
        "Print the diagnosis of interference": f"polytask explain {folder}",
        "Write this page again": f"polytask report {folder}",
        "Train again, exactly as here": f"polytask fit {table} --config {folder}/config.yaml --out {shlex.quote(run + '-again')}",
    }
    where = tag("p", "Every number of this page stands in ", tag("code", "results.json"), " beside it.", class_="note")
    listed = _facts({what: tag("code", command) for what, command in commands.items()})
    return section("replay", "Use it, do it again", listed, where)

"""The two tables of values: every task and metric alone and joint, and every method under one budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polytask.report.markup import Markup, join, section, tag
from polytask.report.numbers import MISSING, bracket, decimals_for, percent, plain
from polytask.report.reading import (
    Effect,
    Interval,
    Results,
    decimals_of,
    delta_m,
    effect_of_metric,
    effect_of_task,
    improvement,
    interval,
    joint_name,
    label_of,
    oriented_difference,
    ranked_methods,
)
from polytask.report.strips import Axis, axis_around_zero, axis_labels, strip, ticks_of

OF_RESULTS = (
    "Values on the test rows. “Joint” is {joint}. The difference is joint minus single task in the metric's own units, with its "
    "interval in brackets. The drawn interval is in percent of the single-task value and turned so that right is always better; "
    "a dashed one belongs to a metric for which a percentage means nothing and has a scale of its own."
)


def results_table(results: Results) -> Markup:
    """Per task and metric: single-task value, joint value, difference with its interval, drawn and in words."""
    changes = [c for t in results["tasks"] for m in t.get("metrics") or () if (c := improvement(m))]
    axis = axis_around_zero(changes, symmetric=True)
    head = _head("Metric", "Single task", "Joint", "Difference", "← worse, better →", "Effect")
    bodies = [_task_rows(task, axis) for task in results["tasks"]]
    foot = tag("tfoot", tag("tr", tag("td", colspan=4), tag("td", axis_labels(axis, " %"), class_="drawn"), tag("td")))
    return section(
        "results",
        "Results, task by task",
        tag("p", OF_RESULTS.format(joint=label_of(results, joint_name(results))), class_="note"),
        tag("table", head, *bodies, foot, class_="cards results"),
    )


def _head(*titles: str) -> Markup:
    return tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))


def _effect(effect: Effect, label: str | None = None) -> Markup:
    return tag("td", f"{effect.symbol} {effect.word}", class_=f"effect {effect.style}", data_label=label)


def _task_rows(task: Mapping[str, Any], axis: Axis) -> Markup:
    labels = (task.get("labels") or {}).get("train")
    facts = ", ".join(x for x in (task.get("kind"), f"{plain(labels, 0)} training labels" if labels else None) if x)
    title = tag("th", tag("span", task["name"], class_="name"), tag("small", facts), colspan=5, scope="rowgroup")
    head = tag("tr", title, _effect(effect_of_task(task)), class_="task")
    return tag("tbody", head, *(_metric_row(task, metric, axis) for metric in task.get("metrics") or ()))


def _metric_row(task: Mapping[str, Any], metric: Mapping[str, Any], axis: Axis) -> Markup:
    effect, decimals, change = effect_of_metric(metric), decimals_of(metric), improvement(metric)
    direction = "↑ higher is better" if metric.get("higher_is_better", True) else "↓ lower is better"
    primary = tag("span", "primary", class_="tagged") if metric["name"] == task.get("primary") else None
    return tag(
        "tr",
        tag("th", metric["name"], primary, tag("small", direction), scope="row"),
        _value(interval(metric.get("single_task")), "Single task", decimals),
        _value(interval(metric.get("joint")), "Joint", decimals),
        _difference(interval(metric.get("difference")), change, decimals),
        tag("td", _drawn(task, metric, change, axis, effect.style), class_="drawn"),
        _effect(effect, "Effect"),
    )


def _value(found: Interval, label: str, decimals: int) -> Markup:
    return tag("td", plain(found.mean, decimals), _spread(found, decimals), class_="number", data_label=label)


def _spread(found: Interval, decimals: int, sign: bool = False) -> Markup | None:
    text = bracket(found.low, found.high, decimals, sign)
    return tag("small", text) if text else None


def _difference(difference: Interval, change: Interval | None, decimals: int) -> Markup:
    said = None
    if change is not None and change.mean is not None:
        said = f" {percent(abs(change.mean), sign=False)} {'better' if change.mean >= 0 else 'worse'}"
    return tag(
        "td",
        tag("b", plain(difference.mean, decimals, sign=True)),
        tag("span", said, class_="quiet") if said else None,
        _spread(difference, decimals, sign=True),
        class_="number",
        data_label="Difference",
    )


def _drawn(
    task: Mapping[str, Any], metric: Mapping[str, Any], change: Interval | None, axis: Axis, style: str
) -> Markup | None:
    title = f"{task['name']}, {metric['name']}:"
    if change is not None:
        spread = bracket(change.low, change.high, 1, sign=True)
        return strip([(change, style)], axis, f"{title} {percent(change.mean)} {spread}", 40, ticks_of(axis))
    own = oriented_difference(metric)
    if own.mean is None:
        return None
    own_axis = axis_around_zero([own], symmetric=True)
    return strip(
        [(own, f"{style} dashed")], own_axis, f"{title} {plain(own.mean, sign=True)} on a scale of its own", 40
    )


def methods(results: Results) -> Markup:
    """All methods, drawn and in numbers, the best first, and every value of every method to unfold."""
    ranked = ranked_methods(results)
    axis = axis_around_zero([i for m in ranked for i in (delta_m(m, "tasks"), delta_m(m, "metrics"))])
    chosen = results["verdict"].get("method")
    head = _head("Method", "Δm over tasks", "Δm over metrics", "Better than single task →", "Mean rank", "Seconds")
    rows = tag("tbody", *(_method_row(m, axis, m.get("name") == chosen) for m in ranked))
    drawn = tag("td", axis_labels(axis, " %"), class_="drawn")
    foot = tag("tfoot", tag("tr", tag("td", colspan=3), drawn, tag("td", colspan=2)))
    note = join(
        "Δm is the mean relative improvement over single-task models in percent, higher is better: ",
        tag("b", "●\N{NO-BREAK SPACE}over tasks"),
        " counts every task once, ",
        tag("b", "○\N{NO-BREAK SPACE}over metrics"),
        " every metric once. Intervals in brackets.",
    )
    table = tag("table", head, rows, foot, class_="cards methods")
    return section(
        "methods", "Methods, under one budget", tag("p", note, class_="note"), table, _every_value(results, ranked)
    )


def _method_row(method: Mapping[str, Any], axis: Axis, chosen: bool) -> Markup:
    tasks, metrics = delta_m(method, "tasks"), delta_m(method, "metrics")
    reference = method.get("role") == "reference"
    mark = tag("span", "chosen", class_="tagged") if chosen else None
    title = f"{method.get('label')}: {percent(tasks.mean)} over tasks, {percent(metrics.mean)} over metrics"
    lanes = [(tasks, "accent"), (metrics, "accent hollow")]
    return tag(
        "tr",
        tag("th", method.get("label") or method.get("name"), mark, tag("small", method.get("role", "")), scope="row"),
        _delta(tasks, "Δm over tasks", reference),
        _delta(metrics, "Δm over metrics", reference),
        tag("td", strip(lanes, axis, title, 44, ticks_of(axis)), class_="drawn"),
        tag("td", plain(method.get("mean_rank"), 1), class_="number", data_label="Mean rank"),
        tag("td", plain(method.get("seconds"), 1), class_="number", data_label="Seconds"),
        class_="chosen" if chosen else None,
    )


def _delta(found: Interval, label: str, reference: bool) -> Markup:
    decimals = min(3, max(1, decimals_for(found.low, found.high)))
    value = "0" if reference and not found.mean else plain(found.mean, decimals, sign=True)
    beside = tag("small", "by definition") if reference and not found.mean else _spread(found, decimals, sign=True)
    shown = value if value == MISSING else f"{value}\N{NO-BREAK SPACE}%"
    return tag("td", tag("b", shown), beside, class_="number", data_label=label)


def _every_value(results: Results, ranked: Sequence[Mapping[str, Any]]) -> Markup:
    shown = [(task, metric) for task in results["tasks"] for metric in task.get("metrics") or ()]
    head = _head("Task", "Metric", *(str(m.get("label") or m.get("name")) for m in ranked))
    table = tag("table", head, tag("tbody", *(_values_row(t, m, ranked) for t, m in shown)), class_="wide")
    summary = tag("summary", "Every method on every task (test rows, mean over seeds)")
    return tag("details", summary, tag("div", table, class_="scroll", tabindex=0))


def _values_row(task: Mapping[str, Any], metric: Mapping[str, Any], ranked: Iterable[Mapping[str, Any]]) -> Markup:
    values = [((m.get("values") or {}).get(task["name"]) or {}).get(metric["name"]) for m in ranked]
    cells = [tag("td", plain(value, decimals_of(metric)), class_="number") for value in values]
    return tag("tr", tag("th", task["name"], scope="row"), tag("td", metric["name"]), *cells)

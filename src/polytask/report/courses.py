"""What happened over the epochs: learning curves of every task, weights and gradient norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polytask.report.curves import Line, chart, legend, over_seeds, series
from polytask.report.markup import Markup, join, section, tag
from polytask.report.numbers import SPACE, finite, plain
from polytask.report.reading import Results, histories, joint_name, label_of, mean_of, reference_name

UNFOLDED_TASKS, COLOURS = 6, 8
OF_CURVES = (
    "Lines are means over seeds, bands reach from the lowest to the highest seed. "
    "Where some seeds stopped early, the line goes on with the others."
)
GROUPS = "groups"
OF_WEIGHTS = (
    "How the total weight was shared between the tasks' losses or gradients, in percent: "
    "means over seeds, with the band from the lowest to the highest."
)


def learning_curves(results: Results) -> Markup:
    """Two charts a task, training loss and primary metric: single task, equal weighting and the joint method."""
    shown = _compared(results)
    if not shown:
        nothing = tag("p", "No learning curves were recorded in this run.", class_="nothing")
        return section("curves", "Learning curves", nothing)
    blocks = [_of_task(results, task, shown) for task in results["tasks"]]
    first, rest = blocks[:UNFOLDED_TASKS], blocks[UNFOLDED_TASKS:]
    more = tag("details", tag("summary", f"The other {len(rest)} tasks"), *rest) if rest else None
    names = legend([(label_of(results, name), style) for name, style in shown])
    return section("curves", "Learning curves", tag("p", OF_CURVES, class_="note"), names, *first, more)


def _compared(results: Results) -> list[tuple[str, str]]:
    wanted = ((reference_name(results), "reference"), ("equal", "equal"), (joint_name(results), "joint"))
    styles = {
        name: style for name, style in wanted if name
    }  # equal weighting may itself be the joint method: the last counts
    return [(name, style) for name, style in styles.items() if histories(results, name)]


def _of_task(results: Results, task: Mapping[str, Any], shown: Sequence[tuple[str, str]]) -> Markup:
    name, primary = task["name"], task.get("primary")
    higher = next((m.get("higher_is_better", True) for m in task.get("metrics") or () if m["name"] == primary), True)
    loss, validation = (_lines(results, shown, *keys) for keys in (("train_loss", name), ("validation", name, primary)))
    epochs = _epochs(results, [n for n, _ in shown])
    ends = ", ".join(f"{line.name} {plain(_last(line))}" for line in validation if line.known)
    judged = f"Validation {primary}, {'higher' if higher else 'lower'} is better"
    return tag(
        "div",
        tag("div", tag("h3", name), tag("small", f"Last validation {primary}: {ends}") if ends else None),
        tag(
            "div",
            _figure(
                "Training loss", chart(loss, epochs, f"{name}: training loss", f"Training loss of {name} over epochs.")
            ),
            _figure(judged, chart(validation, epochs, f"{name}: {judged}", f"Over the epochs it ends at: {ends}.")),
            class_="charts",
        ),
        class_="task-curves",
    )


def _figure(caption: object, drawn: Markup) -> Markup:
    return tag("figure", tag("figcaption", caption), drawn)


def _lines(results: Results, shown: Sequence[tuple[str, str]], *keys: Any) -> list[Line]:
    runs = {name: [series(h, *keys) for h in histories(results, name)] for name, _ in shown}
    return [over_seeds(label_of(results, name), style, runs[name]) for name, style in shown]


def _last(line: Line) -> float | None:
    return next((v for v in reversed(line.mean) if v is not None), None)


def _epochs(results: Results, methods: Sequence[str]) -> Sequence[Any]:
    return max((h.get("epoch") or [] for n in methods for h in histories(results, n)), key=len, default=[])


def weight_curves(results: Results) -> Markup:
    """The share of every task in the total weight: a chart for each method whose weights move, words for the others."""
    names = [task["name"] for task in results["tasks"]]
    charts, held = [], []
    for method in _joint_first(results):
        label, lines = label_of(results, method["name"]), _shares(results, method, names)
        if _moves(lines):
            title = f"{label}: share of the total weight"
            epochs = _epochs(results, [method["name"]])
            charts.append(
                _figure(label, chart(lines, epochs, title, f"{title}, by task.", unit=f"{SPACE}%", floor=0.0))
            )
        elif lines:
            shares = ", ".join(f"{line.name} {plain(_last(line), 0)}{SPACE}%" for line in lines)
            held.append(tag("li", tag("b", label), ": ", shares))
    if not charts and not held:
        nothing = tag("p", "No method of this run recorded weights.", class_="nothing")
        return section("weights", "Weights over time", nothing)
    drawn = tag("div", *charts, class_="charts") if charts else None
    fixed = join(tag("p", "Weights that do not move:"), tag("ul", *held, class_="reasons")) if held else None
    note = tag("p", OF_WEIGHTS, class_="note")
    return section("weights", "Weights over time", note, legend_of(names), drawn, fixed, _norms(results, names))


def legend_of(names: Sequence[str]) -> Markup:
    """The lines of the tasks."""
    return legend([(name, task_style(i)) for i, name in enumerate(names)])


def task_style(index: int) -> str:
    """The class of a task's line: one of eight colours, then the same colours with other dashes."""
    return f"c{index % COLOURS} d{index // COLOURS % 3}"


def _joint_first(results: Results) -> list[Mapping[str, Any]]:
    joint, reference = joint_name(results), reference_name(results)
    methods = [m for m in results["methods"] if m.get("name") != reference]
    return sorted(methods, key=lambda m: m.get("name") != joint)


def _shares(results: Results, method: Mapping[str, Any], names: Sequence[str]) -> list[Line]:
    if method["name"] == GROUPS:  # weights of separate networks share no total
        return []
    weights = [h.get("weights") or {} for h in histories(results, method["name"])]
    if not any(weights) and method.get("weights"):  # fixed weights need no history
        weights = [{name: [w] for name, w in method["weights"].items()}]
    runs = [_percentages(found, names) for found in weights if found]
    lines = [over_seeds(name, task_style(i), [run[name] for run in runs]) for i, name in enumerate(names)]
    return lines if len(names) > 1 and any(line.known for line in lines) else []


def _percentages(weights: Mapping[str, Sequence[Any]], names: Sequence[str]) -> dict[str, list[float | None]]:
    known = {n: [finite(w) for w in weights.get(n) or ()] for n in names}
    epochs = range(max(map(len, known.values()), default=0))
    totals = [sum(abs(w) for v in known.values() if e < len(v) and (w := v[e]) is not None) for e in epochs]
    return {
        n: [100 * w / totals[e] if w is not None and totals[e] else None for e, w in enumerate(v)]
        for n, v in known.items()
    }


def _moves(lines: Sequence[Line]) -> bool:
    ranges = [[v for v in line.mean if v is not None] for line in lines]
    return any(
        max(r) - min(r) > 0.5 for r in ranges if r
    )  # half a percent of the total is less than the chart can show


def _norms(results: Results, names: Sequence[str]) -> Markup | None:
    joint = joint_name(results)
    runs = histories(results, joint)
    lines = [over_seeds(n, task_style(i), [series(h, "gradient_norm", n) for h in runs]) for i, n in enumerate(names)]
    sizes = {line.name: size for line in lines if (size := mean_of(line.mean)) is not None}
    if len(sizes) < 2:
        return None
    largest = f"{max(sizes, key=lambda n: sizes[n])} has the largest gradient on average."
    drawn = chart(lines, _epochs(results, [joint or ""]), "Norm of each task's gradient", largest, floor=0.0)
    said = f"Norm of each task's gradient at the shared parameters, {label_of(results, joint)}. {largest}"
    return tag("div", tag("h3", "Gradient norms"), tag("div", _figure(said, drawn), class_="charts"))

"""The verdict and the methods as tables for the terminal, never wider than 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from polytask.report.numbers import MISSING, bracket, decimals_for, duration, finite, plain
from polytask.report.reading import (
    UNCLEAR,
    Effect,
    Interval,
    Results,
    check,
    decimals_of,
    delta_m,
    effect_of_metric,
    effect_of_task,
    improvement,
    interval,
    joint_name,
    label_of,
    ranked_methods,
)

WIDEST, WIDE, BAR = 100, 96, 11
COLOURS = {"gain": "green", "lose": "red", "even": "dim"}
TYPEWRITER = str.maketrans("▲▼●○↑↓→│─−–…\N{NO-BREAK SPACE}", "+-=?^v>|---~ ")


class Sheet:
    """Something to print that adapts to the width and the characters of the terminal, at most 100 columns.

    Args:
        compose: ``width -> renderable``.
    """

    def __init__(self, compose: Callable[[int], RenderableType]) -> None:
        self.compose = compose

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDEST, options.max_width)
        for line in console.render_lines(self.compose(width), options.update(width=width), pad=False):
            for text, style, control in line:
                yield Segment(_writable(text, options.encoding), style, control)
            yield Segment.line()


def _writable(text: str, encoding: str) -> str:
    # a name or sign that the terminal cannot show must not stop the verdict from being printed
    if encoding.startswith("utf"):
        return text
    return text.translate(TYPEWRITER).encode(encoding, "replace").decode(encoding)


def verdict_table(results: Results) -> Sheet:
    """The verdict in words, then every task and metric: single-task value, joint value, difference with interval, effect.

    Raises:
        InputError: the results lack a part that every run has.
    """
    check(results)
    return Sheet(lambda width: Group(_verdict(results), _results(results, width), _cost(results)))


def methods_table(results: Results) -> Sheet:
    """Every method, the best first: Delta_m over tasks and over metrics with intervals, mean rank and seconds.

    Raises:
        InputError: the results lack a part that every run has.
    """
    check(results)
    return Sheet(lambda width: _methods(results, width))


def finding(effect: Effect) -> Text:
    """A coloured word with a sign that survives without colour."""
    word = "unclear" if effect == UNCLEAR else effect.word
    return Text(f"{effect.symbol} {word}", style=COLOURS[effect.style])


def framed(title: str, *lines: RenderableType) -> Panel:
    """Sentences in a box under a title."""
    return Panel(Group(*lines), title=title, title_align="left", border_style="blue")


def _verdict(results: Results) -> Panel:
    found = results["verdict"]
    lines = [Text(str(found.get("text") or "This run came to no verdict."), style="bold")]
    groups = found.get("groups") or ()
    if any(len(group) > 1 for group in groups) and len(groups) > 1:
        lines.append(Text("Models: " + "; ".join(" + ".join(map(str, group)) for group in groups)))
    lines += [Text(f"- {reason}") for reason in found.get("reasons") or ()]
    return framed("Verdict", *lines)


def _results(results: Results, width: int) -> Table:
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), width=width, title_justify="left")
    table.title = Text(f"Joint: {label_of(results, joint_name(results))}")
    table.add_column("Task, metric", ratio=1, overflow="ellipsis", no_wrap=True, min_width=12)
    for head in ("Single", "Joint", "Difference"):
        table.add_column(head, justify="right", no_wrap=True)
    if wide:
        table.add_column("Interval", no_wrap=True)
        table.add_column("better →".rjust(BAR), no_wrap=True, width=BAR)
    table.add_column("Effect", no_wrap=True)
    changes = [c for task in results["tasks"] for m in task.get("metrics") or () if (c := improvement(m))]
    reach = max((abs(x) for change in changes for x in change if x is not None), default=0.0) or 1.0
    for task in results["tasks"]:
        blank = [""] * (5 if wide else 3)
        table.add_row(Text(" ".join(str(task["name"]).split()), style="bold"), *blank, finding(effect_of_task(task)))
        for metric in task.get("metrics") or ():
            table.add_row(*_metric_cells(metric, wide, reach))
    return table


def _metric_cells(metric: Mapping[str, Any], wide: bool, reach: float) -> list[RenderableType]:
    single, joint, difference = (interval(metric.get(part)) for part in ("single_task", "joint", "difference"))
    decimals, effect = decimals_of(metric), effect_of_metric(metric)
    arrow = "↑" if metric.get("higher_is_better", True) else "↓"
    values = [plain(single.mean, decimals), plain(joint.mean, decimals), plain(difference.mean, decimals, sign=True)]
    cells: list[RenderableType] = [Text(f"  {arrow} {metric['name']}"), *values]
    if wide:
        cells.append(Text(bracket(difference.low, difference.high, decimals, sign=True)))
        cells.append(_bar(improvement(metric), reach, effect))
    return [*cells, finding(effect)]


def _bar(change: Interval | None, reach: float, effect: Effect) -> Text:
    if change is None or change.mean is None:
        return Text("")
    half = BAR // 2
    low, mean, high = (
        half if x is None else round(half + half * x / reach) for x in (change.low, change.mean, change.high)
    )
    cells = [" "] * BAR
    if change.known:
        cells[low : high + 1] = "─" * (high + 1 - low)
    cells[half] = "│"
    cells[mean] = "●"
    return Text("".join(cells), style=COLOURS[effect.style])


def _cost(results: Results) -> Text:
    cost = results.get("cost") or {}
    seconds, joint, alone = (finite(cost.get(k)) for k in ("seconds", "joint_seconds", "single_task_seconds"))
    said = [f"The run took {duration(seconds)}."] if seconds is not None else []
    if joint is not None and alone is not None:
        said.append(f"Joint model: {duration(joint)}; single-task models together: {duration(alone)}.")
    said.append(str((results.get("budget") or {}).get("text") or ""))
    return Text(" ".join(said).strip(), style="dim")


def _methods(results: Results, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), width=width, caption_justify="left")
    table.caption = Text("Delta_m: percent better than single-task models, with intervals. *: chosen.")
    table.add_column("Method", ratio=1, overflow="ellipsis", no_wrap=True, min_width=12)
    for head in ("Delta_m tasks", "Delta_m metrics", "Rank", "Seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    chosen = results["verdict"].get("method")
    for method in ranked_methods(results):
        mark, style = ("* ", "bold") if method.get("name") == chosen else ("  ", "")
        label = Text(f"{mark}{method.get('label') or method.get('name')}", style=style)
        deltas = [_delta(method, over, width >= WIDE) for over in ("tasks", "metrics")]
        table.add_row(label, *deltas, plain(method.get("mean_rank"), 1), plain(method.get("seconds"), 1))
    return table


def _delta(method: Mapping[str, Any], over: str, wide: bool) -> Text:
    found = delta_m(method, over)
    if method.get("role") == "reference" and not found.mean:
        return Text("0")
    decimals = min(2 if wide else 1, max(1, decimals_for(found.low, found.high)))
    value = plain(found.mean, decimals, sign=True)
    return Text(value if value == MISSING else f"{value} {bracket(found.low, found.high, decimals, sign=True)}".strip())

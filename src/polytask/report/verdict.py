"""The top of the report: what to do, in words, and the few figures behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from polytask.report.markup import Markup, tag
from polytask.report.numbers import MISSING, SPACE, bracket, decimals_for, duration, finite, plain, shortened
from polytask.report.reading import (
    GAINS,
    LOSES,
    UNCLEAR,
    UNKNOWN,
    Effect,
    Interval,
    Results,
    delta_m,
    effect_of_task,
    joint_name,
    label_of,
    method_of,
    sentences,
)

LONGEST_NAME, FEW_REASONS = 30, 4


def verdict(results: Results) -> Markup:
    """The verdict's sentences, what happens to the tasks, four figures, the groups to train, and the reasons."""
    found = results["verdict"]
    said = sentences(str(found.get("text") or "This run came to no verdict."))
    return tag(
        "section",
        tag("h1", said[0]),
        tag("p", " ".join(said[1:]), class_="lead") if said[1:] else None,
        effects(results),
        tiles(results),
        tag(
            "div",
            _together(found.get("groups") or ()),
            _why(found.get("reasons") or ()),
            class_="columns" if len(found.get("reasons") or ()) <= FEW_REASONS else "rows",
        ),
        id="verdict",
    )


def effects(results: Results) -> Markup:
    """How many tasks gain, lose or do not care, each with its names."""
    counted = Counter(effect_of_task(task) for task in results["tasks"])
    chips = [_chip(results, effect, counted[effect]) for effect in (GAINS, LOSES, UNCLEAR, UNKNOWN) if counted[effect]]
    return tag("ul", *chips, class_="chips", aria_label="What joint training does to the tasks")


def _chip(results: Results, effect: Effect, n: int) -> Markup:
    one, many = {
        GAINS: ("gains", "gain"),
        LOSES: ("loses", "lose"),
        UNCLEAR: ("without a clear change", "without a clear change"),
        UNKNOWN: ("not judged", "not judged"),
    }[effect]
    names = ", ".join(str(task["name"]) for task in results["tasks"] if effect_of_task(task) == effect)
    said = f"{effect.symbol} {n} task {one}" if n == 1 else f"{effect.symbol} {n} tasks {many}"
    return tag("li", tag("b", said), " ", tag("span", names), class_=f"chip {effect.style}")


def tiles(results: Results) -> Markup:
    """Delta_m in both conventions, mean rank and training time of the joint method."""
    name = joint_name(results)
    method, cost = method_of(results, name), results.get("cost") or {}
    alone, joint = finite(cost.get("single_task_seconds")), finite(cost.get("joint_seconds"))
    label = label_of(results, name)
    figures = (
        _tile(
            "Gain, mean over tasks",
            *_percent(delta_m(method, "tasks")),
            "Δm, single\N{NO-BREAK SPACE}task\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0",
        ),
        _tile(
            "Gain, mean over metrics",
            *_percent(delta_m(method, "metrics")),
            "Δm, single\N{NO-BREAK SPACE}task\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0",
        ),
        _tile("Mean rank", plain(method.get("mean_rank"), 1), f"of {len(results['methods'])} methods", "1 is best"),
        _tile("Time to train", duration(joint), f"single tasks: {duration(alone)}", "one seed, joint model"),
    )
    caption = tag(
        "p",
        "Joint training: ",
        tag("b", label),
        ", against single-task models on the test rows",
        class_="note caption",
    )
    return tag("div", caption, tag("div", *figures, class_="tiles"))


def _percent(shown: Interval) -> tuple[str, str]:
    decimals = min(2, max(1, decimals_for(shown.low, shown.high)))
    value = plain(shown.mean, decimals, sign=True)
    spread = bracket(shown.low, shown.high, decimals, sign=True)
    return (value if value == MISSING else f"{value}{SPACE}%"), spread or "no interval"


def _tile(label: str, value: str, beside: str, below: str) -> Markup:
    return tag(
        "dl",
        tag("dt", label),
        tag("dd", value, class_="value"),
        tag("dd", beside),
        tag("dd", below, class_="quiet"),
    )


def _together(groups: Sequence[Sequence[str]]) -> Markup | None:
    if not groups:
        return None
    title = "Train one model for all tasks" if len(groups) == 1 else f"Train {len(groups)} models"
    title = "Train each task alone" if len(groups) > 1 and all(len(g) == 1 for g in groups) else title
    return tag("div", tag("h2", title), group_boxes(groups))


def group_boxes(groups: Sequence[Sequence[str]]) -> Markup:
    """Each group of tasks as a box of their names."""
    return tag("ul", *(tag("li", *map(_pill, group), class_="group") for group in groups), class_="groups")


def _pill(name: str) -> Markup:
    return tag("span", shortened(name, LONGEST_NAME), class_="pill", title=name if len(name) > LONGEST_NAME else None)


def _why(reasons: Sequence[str]) -> Markup | None:
    return (
        tag("div", tag("h2", "Why"), tag("ul", *(tag("li", r) for r in reasons), class_="reasons")) if reasons else None
    )

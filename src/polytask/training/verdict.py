"""From results to words: what to learn together, with which method, what each target makes of it, and what these data cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polytask.metrics import Interval
from polytask.training.protocol import EQUAL, GROUPS, SCALARIZATION, SINGLE


@dataclass(frozen=True)
class Evidence:
    """What the verdict may speak of.

    Attributes:
        chosen: the method to recommend, single-task training included.
        best: the method with the best validation score, single-task training included.
        joint: the method whose values stand in the table beside the single-task ones: ``chosen``, or the best other one.
        labels: {method: label}.
        groups: the tasks that share a model under ``chosen``.
        validation: {method: Delta_m over tasks on validation rows}.
        gain: Delta_m over tasks and over metrics of ``joint`` on test rows.
        against: {baseline: Delta_m over tasks of ``joint`` minus the baseline's, on test rows}.
        effects: {task: gains, loses or indifferent} under ``joint``.
        differences: {task: (primary metric, joint minus single)}.
        seconds: {method: seconds of training one complete solution}.
        seeds: how many seeds.
    """

    chosen: str
    best: str
    joint: str
    labels: Mapping[str, str]
    groups: Sequence[Sequence[str]]
    validation: Mapping[str, float]
    gain: tuple[Interval, Interval]
    against: Mapping[str, Interval]
    effects: Mapping[str, str]
    differences: Mapping[str, tuple[str, Interval]]
    seconds: Mapping[str, float]
    seeds: int


def effect(difference: Interval, higher_is_better: bool) -> str:
    """``gains`` or ``loses`` where the interval of joint minus single lies on one side of zero, else ``indifferent``."""
    if not difference.excludes_zero:
        return "indifferent"
    return "gains" if (difference.low > 0) == higher_is_better else "loses"


def judge(seen: Evidence) -> dict[str, Any]:
    """The verdict as ``results.json`` holds it: text, groups, method, reasons."""
    return {
        "text": f"{recommendation(seen)} {outcome(seen)}",
        "groups": [list(g) for g in seen.groups],
        "method": seen.chosen,
        "joint": seen.joint,
        "reasons": reasons(seen),
    }


def recommendation(seen: Evidence) -> str:
    """One sentence: what to do. It rests on validation rows."""
    n = sum(len(g) for g in seen.groups)
    if seen.chosen == SINGLE:
        return f"Learn the {n} targets apart: on validation rows every way of learning them together did worse."
    why = "the best score on validation rows"
    if seen.chosen != seen.best:
        why = f"the simplest way within one standard error of {why} (that of {_inline(seen.labels[seen.best])})"
    if seen.chosen == GROUPS:
        together = [g for g in seen.groups if len(g) > 1]
        alone = [g[0] for g in seen.groups if len(g) == 1]
        parts = [f"{_listed(g)} together" for g in together] + [f"{_listed(alone)} apart"] * bool(alone)
        return f"Learn {'; '.join(parts)}: {why}."
    return f"Learn the {n} targets together, with {_inline(seen.labels[seen.chosen])}: {why}."


def outcome(seen: Evidence) -> str:
    """What the test rows say of it, and no more than their intervals allow."""
    gain, _ = seen.gain
    how = f" ({_inline(seen.labels[seen.joint])})" if seen.chosen == SINGLE else ""
    noise = "beyond noise" if gain.excludes_zero else "within noise"
    words = {
        "gains": ("gains", "gain"),
        "loses": ("loses", "lose"),
        "indifferent": ("shows no clear change", "show no clear change"),
    }
    parts = []
    for what, (one, several) in words.items():
        names = [t for t, e in seen.effects.items() if e == what]
        if names:
            parts.append(f"{_listed(names)} {one if len(names) == 1 else several}")
    return (
        f"On test rows learning together{how} is worth {_percent(gain)} on average over targets against single-task "
        f"models, which is {noise}: {'; '.join(parts)}."
    )


def reasons(seen: Evidence) -> list[str]:
    """The evidence behind the verdict, a sentence each."""
    found = [_selection(seen), *_contradiction(seen), *_targets(seen), *_rivals(seen), *_two_averages(seen)]
    single, joint = seen.seconds[SINGLE], seen.seconds[seen.joint]
    found.append(
        f"Training took {joint:.1f} s for {_inline(seen.labels[seen.joint])} and {single:.1f} s for all single-task models together "
        "(mean of a seed)."
    )
    if seen.seeds == 1:
        found.append(
            "With one seed the intervals speak of test rows only, not of what another random start would give."
        )
    return found


def _selection(seen: Evidence) -> str:
    scores = sorted(((v, m) for m, v in seen.validation.items()), key=lambda p: -p[0])
    shown = ", ".join(f"{_inline(seen.labels[m])} {v:+.2f} %" for v, m in scores[:4])
    return f"Delta_m over tasks on validation rows, where the choice was made: {shown}."


def _contradiction(seen: Evidence) -> list[str]:
    gain, apart = seen.gain[0], seen.chosen == SINGLE
    if (gain.low > 0) if apart else (gain.high < 0):
        word = "better" if apart else "worse"
        return [
            f"Beware: the test rows contradict the validation rows: {_percent(gain)} is {word} than single-task models, "
            "beyond noise."
        ]
    if not apart and not gain.excludes_zero:
        networks, n = len(seen.groups), sum(len(g) for g in seen.groups)
        return [
            "The test rows cannot tell it from single-task models on average: what speaks for it is "
            f"{networks} network{'s' * (networks > 1)} instead of {n}, not accuracy."
        ]
    return []


def _targets(seen: Evidence) -> list[str]:
    said = {"gains": "gains", "loses": "loses", "indifferent": "shows no change beyond noise"}
    return [
        f"{task} {said[seen.effects[task]]}: {metric} {d.mean:+.4g} [{d.low:+.4g}, {d.high:+.4g}] against its single-task model."
        for task, (metric, d) in seen.differences.items()
    ]


def _rivals(seen: Evidence) -> list[str]:
    found = []
    for rival in (EQUAL, SCALARIZATION):
        if rival == seen.joint or rival not in seen.against:
            continue
        d, label = seen.against[rival], _inline(seen.labels[seen.joint])
        if d.excludes_zero:
            word = "better" if d.low > 0 else "worse"
            found.append(
                f"On test rows {label} is {word} than {_inline(seen.labels[rival])}, by {_percent(d)} of Delta_m over tasks."
            )
        else:
            found.append(
                f"On test rows {label} cannot be told from {_inline(seen.labels[rival])} ({_percent(d)} of Delta_m over tasks)."
            )
    return found


def _two_averages(seen: Evidence) -> list[str]:
    over_tasks, over_metrics = seen.gain
    if over_tasks.mean * over_metrics.mean >= 0:
        return []
    return [
        f"The two averages disagree: {over_tasks.mean:+.2f} % over tasks, {over_metrics.mean:+.2f} % over metrics, where a "
        "target with more metrics counts more."
    ]


def _percent(i: Interval) -> str:
    return f"{i.mean:+.2f} % [{i.low:+.2f}, {i.high:+.2f}]"


def _inline(label: str) -> str:
    """A label within a sentence: names keep their capitals, descriptions lose the first."""
    first = label.split(" ")[0]
    return label if first[1:] != first[1:].lower() else label[0].lower() + label[1:]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

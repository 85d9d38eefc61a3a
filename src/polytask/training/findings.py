"""The parts of ``results.json`` (``docs/results.md``) from what a study trained and judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import polytask
from polytask.metrics import Interval
from polytask.training.jobs import Outcome
from polytask.training.judging import Bench
from polytask.training.protocol import EQUAL, GROUPS, SCALARIZATION, SINGLE, Method, Settings, budget_text
from polytask.training.search import Search
from polytask.training.study_table import StudyRows
from polytask.training.verdict import Evidence, effect, judge

SHOWN_GROUPINGS = 20


def results_of(
    table: StudyRows,
    settings: Settings,
    search: Search,
    bench: Bench,
    spec: Mapping[str, Any],
    source: str,
    seconds: float,
) -> dict[str, Any]:
    """Everything a report needs.

    Args:
        table: of the study.
        settings: of the study.
        search: done.
        bench: with all methods judged on test rows.
        spec: of the encoder.
        source: what the table is called.
        seconds: the study took.
    """
    chosen, joint = search.chosen, search.joint
    costs = {m.name: [_cost(search.outcomes(m, s)) for s in settings.seeds] for m in search.methods}
    tasks = task_rows(table, bench, joint.name)
    return {
        "polytask": polytask.__version__,
        "schema": 1,
        "data": {
            "source": source,
            "rows": len(table),
            "features": spec["features"],
            "columns": spec["columns"],
            "split": {**table.split.sizes, "how": table.split.how},
            "missing": table.missing(),
        },
        "budget": {
            "seeds": list(settings.seeds),
            "epochs": settings.config.epochs,
            "trials": settings.trials,
            "text": budget_text(settings, len(search.asked)),
        },
        "tasks": tasks,
        "methods": [method_row(m, search, bench, settings, costs[m.name]) for m in search.methods],
        "verdict": judge(_evidence(search, bench, chosen, joint, tasks, settings, costs)),
        "grouping": {"candidates": _candidates(search, bench), "how": search.how},
        "history": {
            m.name: {str(s): history_of(search.outcomes(m, s)) for s in settings.seeds} for m in search.methods
        },
        "interference": _interference(search, settings),
        "cost": {
            "seconds": seconds,
            "by_method": {name: sum(s for s, _ in found) for name, found in costs.items()},
            "single_task_seconds": _mean(s for s, _ in costs[SINGLE]),
            "joint_seconds": _mean(s for s, _ in costs[joint.name]),
        },
    }


def task_rows(table: StudyRows, bench: Bench, joint: str) -> list[dict[str, Any]]:
    """One entry a task: its metrics under single-task training, equal weighting and ``joint``, and what joint training does to it."""
    rows, column = [], 0
    for name, task in table.tasks.items():
        metrics, differences = [], []
        for metric in task.metrics:
            shown = {"single_task": SINGLE, "equal": EQUAL, "joint": joint}
            values = {what: bench.value(method, column).to_json() for what, method in shown.items()}
            differences.append(bench.difference(joint, SINGLE, column))
            about = {
                "name": metric.name,
                "higher_is_better": metric.higher_is_better,
                "ratio_scale": metric.ratio_scale,
            }
            metrics.append({**about, **values, "difference": differences[-1].to_json()})
            column += 1
        rows.append(
            {
                "name": name,
                "kind": task.kind.name,
                "classes": list(task.classes),
                "labels": table.label_counts(name),
                "effect": effect(differences[0], task.metrics[0].higher_is_better),
                "primary": metrics[0]["name"],
                "metrics": metrics,
            }
        )
    return rows


def method_row(
    method: Method, search: Search, bench: Bench, settings: Settings, cost: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    """One entry a method."""
    over_tasks, over_metrics = bench.delta_m(method.name, SINGLE)
    values: dict[str, dict[str, float]] = {n: {} for n in search.names}
    for (task, metric), value in zip(bench.columns.pairs, bench.values[method.name], strict=True):
        values[task][metric] = float(value)
    return {
        "name": method.name,
        "label": method.label,
        "role": method.role,
        "why": method.why,
        "delta_m_tasks": over_tasks.mean,
        "delta_m_metrics": over_metrics.mean,
        "delta_m_tasks_interval": [over_tasks.low, over_tasks.high],
        "delta_m_metrics_interval": [over_metrics.low, over_metrics.high],
        "mean_rank": bench.mean_ranks()[method.name],
        "seconds": _mean(s for s, _ in cost),
        "steps": round(_mean(n for _, n in cost)),
        "validation_score": search.validation[method.name],
        "learning_rate": settings.config.learning_rate * method.rate,
        "values": values,
        "weights": _weights(method, search, settings),
    }


def _weights(method: Method, search: Search, settings: Settings) -> dict[str, float] | None:
    """Fixed weights as they are, a method's own as their mean over training, scaled to sum to the number of tasks."""
    if method.name in (SINGLE, GROUPS):
        return None
    if method.name == SCALARIZATION:
        return dict(zip(search.names, search.tuned_weights, strict=True))
    found = []
    for seed in settings.seeds:
        logged = search.outcomes(method, seed)[0].history["weights"]
        found.append([np.mean([w for w in logged[n] if w is not None] or [math.nan]) for n in search.names])
    mean = np.mean(found, axis=0)
    if not np.isfinite(mean).all() or mean.sum() <= 0:
        return None
    return dict(zip(search.names, map(float, mean * len(mean) / mean.sum()), strict=True))


def history_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The course of a training; of several trainings side by side, each task from its own, None after it stopped."""
    histories = [{k: v for k, v in o.history.items() if k != "interference"} for o in outcomes]
    if len(histories) == 1:
        return histories[0]
    longest = max(len(h["epoch"]) for h in histories)
    merged: dict[str, Any] = {"epoch": list(range(1, longest + 1)), "score": [None] * longest}
    merged["seconds"] = [sum(h["seconds"][e] for h in histories if e < len(h["seconds"])) for e in range(longest)]
    for key in ("train_loss", "validation_loss", "explained_share", "weights", "gradient_norm"):
        merged[key] = {n: _padded(v, longest) for h in histories for n, v in h[key].items()}
    merged["validation"] = {
        n: {m: _padded(v, longest) for m, v in found.items()} for h in histories for n, found in h["validation"].items()
    }
    return merged


def _padded(values: list[Any], length: int) -> list[Any]:
    return values + [None] * (length - len(values))


def _evidence(
    search: Search,
    bench: Bench,
    chosen: Method,
    joint: Method,
    tasks: Sequence[Mapping[str, Any]],
    settings: Settings,
    costs: Mapping[str, Sequence[tuple[float, int]]],
) -> Evidence:
    primary = {t["name"]: t["metrics"][0] for t in tasks}
    return Evidence(
        chosen=chosen.name,
        best=search.best.name,
        joint=joint.name,
        labels={m.name: m.label for m in search.methods},
        groups=[[search.names[k] for k in group] for group in chosen.groups],
        validation=search.validation,
        gain=bench.delta_m(joint.name, SINGLE),
        against={b: bench.delta_m_difference(joint.name, b, SINGLE) for b in (EQUAL, SCALARIZATION)},
        effects={t["name"]: t["effect"] for t in tasks},
        differences={n: (m["name"], _read(m["difference"])) for n, m in primary.items()},
        seconds={name: _mean(s for s, _ in found) for name, found in costs.items()},
        seeds=len(settings.seeds),
    )


def _read(found: Mapping[str, float | None]) -> Interval:
    return Interval(**{k: math.nan if v is None else v for k, v in found.items()})


def _candidates(search: Search, bench: Bench) -> list[dict[str, Any]]:
    """The groupings, with Delta_m on test rows for those that were trained on all seeds."""
    trained = {m.groups: m.name for m in reversed(search.methods) if m.name in (SINGLE, EQUAL, GROUPS)}
    found = []
    for candidate in search.groupings[:SHOWN_GROUPINGS]:
        key = tuple(sorted(tuple(search.names.index(n) for n in group) for group in candidate["groups"]))
        name = trained.get(key)
        delta = bench.delta_m(name, SINGLE)[0].mean if name else None
        found.append(
            {"groups": candidate["groups"], "delta_m_tasks": delta, "validation_score": candidate["validation_score"]}
        )
    return found


def _interference(search: Search, settings: Settings) -> dict[str, Any]:
    observed = search.outcomes(search.equal, settings.seeds[0])[0].history.get("interference")
    nothing: dict[str, Any] = {
        k: [] for k in ("epochs", "cosine", "null", "conflict_rate", "null_conflict_rate", "sentences")
    }
    return {"tasks": search.names, **nothing, **(observed or {})}


def _cost(outcomes: Sequence[Outcome]) -> tuple[float, int]:
    """Seconds of training and steps to the validation optimum, of all groups together."""
    return sum(o.seconds for o in outcomes), sum(o.steps for o in outcomes)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))

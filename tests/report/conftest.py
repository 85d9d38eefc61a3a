"""A run's results as a study writes them, made up but of realistic size, shape and noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

KINDS: dict[str, list[tuple[str, bool, bool, float]]] = {
    "binary": [("roc_auc", True, True, 0.87), ("average_precision", True, True, 0.61), ("log_loss", False, True, 0.34)],
    "multiclass": [("accuracy", True, True, 0.72), ("macro_f1", True, True, 0.58), ("log_loss", False, True, 0.81)],
    "regression": [("rmse", False, True, 1234.5), ("mae", False, True, 812.0), ("r2", True, False, 0.31)],
    "count": [("poisson_deviance", False, True, 2.71), ("mae", False, True, 1.93)],
    "ordinal": [("mae", False, True, 0.44), ("accuracy", True, True, 0.63), ("quadratic_kappa", True, False, 0.55)],
}
METHODS = [
    ("single_task", "Single-task models", "reference"),
    ("equal", "Equal weighting", "baseline"),
    ("scalarization", "Tuned scalarization", "baseline"),
    ("uncertainty", "Uncertainty weighting", "method"),
    ("nash_mtl", "Nash-MTL", "method"),
    ("upgrad", "UPGrad", "method"),
]
SHIFTS = [0.03, -0.02, 0.001, 0.015]  # of each task's metrics under joint training, relative, positive = better


def triple(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def make_task(name: str, kind: str, shift: float, rng: random.Random) -> dict[str, Any]:
    metrics = []
    for metric, higher, ratio, level in KINDS[kind]:
        change = level * (shift + rng.gauss(0, 0.003)) * (1 if higher else -1)
        single, equal, joint = (triple(level + c, 0.004 * level) for c in (0.0, change / 2, change))
        metrics.append(
            {"name": metric, "higher_is_better": higher, "ratio_scale": ratio, "single_task": single, "equal": equal,
             "joint": joint, "difference": triple(change, 0.006 * level)}
        )  # fmt: skip
    effect = "gains" if shift > 0.006 else "loses" if shift < -0.006 else "indifferent"
    classes = {"binary": ["no", "yes"], "multiclass": ["a", "b", "c"], "ordinal": ["low", "middle", "high"]}.get(
        kind, []
    )
    labels = {"train": 9124, "validation": 3041, "test": 3042}
    return {"name": name, "kind": kind, "classes": classes, "labels": labels, "effect": effect,
            "primary": metrics[0]["name"], "metrics": metrics}  # fmt: skip


def ends(metric: dict[str, Any], lift: float) -> tuple[float, float]:
    level, better = metric["single_task"]["mean"], 1 if metric["higher_is_better"] else -1
    return level * (1 - 0.2 * better), level * (1 + lift * better)


def make_history(
    tasks: list[dict[str, Any]], epochs: int, lift: float, weighted: bool, rng: random.Random
) -> dict[str, Any]:
    def curve(start: float, end: float, pace: float) -> list[float]:
        return [
            end + (start - end) * math.exp(-e / pace) + rng.gauss(0, abs(start - end) * 0.02) for e in range(epochs)
        ]

    names = [t["name"] for t in tasks]
    validation = {t["name"]: {m["name"]: curve(*ends(m, lift), 4) for m in t["metrics"]} for t in tasks}
    shares = {
        n: [1 + 0.6 * math.sin(e / 5 + i) + rng.gauss(0, 0.05) for e in range(epochs)] for i, n in enumerate(names)
    }
    return {
        "epoch": list(range(1, epochs + 1)),
        "train_loss": {n: curve(1.1, 0.4 - lift, 5) for n in names},
        "validation": validation,
        "weights": shares if weighted else {n: [1.0] * epochs for n in names},
        "gradient_norm": {n: curve(3.0, 0.5, 6) for n in names},
        "score": curve(-5.0, 1.5, 4),
        "seconds": [1.0 + rng.random() / 10 for _ in range(epochs)],
    }


def make_interference(names: list[str], epochs: int, rng: random.Random) -> dict[str, Any]:
    K = len(names)
    seen: dict[str, Any] = {"tasks": names, "epochs": list(range(1, epochs + 1))}
    seen |= {key: [] for key in ("cosine", "null", "conflict_rate", "null_conflict_rate")}
    for e in range(epochs):
        cosine = [[1.0] * K for _ in range(K)]
        rate = [[0.0] * K for _ in range(K)]
        for i in range(K):
            for j in range(i):
                c = 0.35 * math.cos(i * 1.7 + j) * (1 - 0.6 * e / epochs) - 0.05 + rng.gauss(0, 0.03)
                cosine[i][j] = cosine[j][i] = c
                rate[i][j] = rate[j][i] = min(1.0, max(0.0, 0.42 - c))
        seen["cosine"].append(cosine)
        seen["null"].append([0.5 * math.exp(-e / 8) + 0.05 for _ in range(K)])
        seen["conflict_rate"].append(rate)
        seen["null_conflict_rate"].append([0.25 + 0.2 * e / epochs for _ in range(K)])
    seen["sentences"] = [f"{names[0]} and {names[-1]} pull apart more often than mini-batches of one task do."]
    return seen


def make_results(
    names: tuple[str, ...] = ("insurance_cost", "smoker", "health_status", "doctor_visits"),
    kinds: tuple[str, ...] = ("regression", "binary", "ordinal", "count"),
    epochs: int = 20,
    seeds: int = 3,
) -> dict[str, Any]:
    """Results of ``len(names)`` tasks, six methods, ``seeds`` seeds and ``epochs`` epochs."""
    rng = random.Random(0)
    tasks = [make_task(n, kinds[i % len(kinds)], SHIFTS[i % len(SHIFTS)], rng) for i, n in enumerate(names)]
    methods, history = [], {}
    for rank, (name, label, role) in enumerate(METHODS):
        lift = 0.0 if role == "reference" else 0.4 + 0.35 * rank
        methods.append({
            "name": name, "label": label, "role": role, "delta_m_tasks": lift, "delta_m_metrics": lift * 0.8,
            "delta_m_tasks_interval": [lift - 0.7, lift + 0.7] if lift else [0.0, 0.0],
            "delta_m_metrics_interval": [lift * 0.8 - 0.6, lift * 0.8 + 0.6] if lift else [0.0, 0.0],
            "mean_rank": 6.0 - rank * 0.7, "seconds": 40.0 + 11 * rank, "steps": 1440, "validation_score": lift + 0.1,
            "values": {t["name"]: {m["name"]: m["joint"]["mean"] for m in t["metrics"]} for t in tasks},
            "weights": {n: 0.5 + 0.25 * i for i, n in enumerate(names)} if name == "scalarization" else None,
        })  # fmt: skip
        weighted = role == "method"
        history[name] = {str(s): make_history(tasks, epochs, lift / 50, weighted, rng) for s in range(seeds)}
    whole, alone = [list(names)], [[n] for n in names]
    return {
        "polytask": "0.1.0",
        "schema": 1,
        "data": {
            "source": "health.csv", "rows": 15207, "features": {"numeric": 11, "categorical": 6, "text": 1},
            "columns": [f"column_{i}" for i in range(18)],
            "split": {"train": 9124, "validation": 3041, "test": 3042, "how": "stratified at random by the targets"},
            "missing": {n: 0.04 * i for i, n in enumerate(names)},
        },
        "budget": {"seeds": list(range(seeds)), "epochs": epochs, "trials": 8,
                   "text": "Every method had the same 20 epochs, 3 seeds and 8 trials for its options, chosen on validation rows only."},
        "tasks": tasks,
        "methods": methods,
        "verdict": {
            "text": f"Train these {len(names)} targets together with UPGrad. On average they are 2.2 % better than alone [+1.5 %, +2.9 %].",
            "groups": whole, "method": "upgrad",
            "reasons": ["UPGrad has the best validation score of the six methods.", "No split into groups did better on validation rows."],
        },
        "grouping": {"candidates": [
            {"groups": whole, "delta_m_tasks": 2.15, "validation_score": 2.3},
            {"groups": [list(names[:2]), list(names[2:])], "delta_m_tasks": 1.4, "validation_score": 1.5},
            {"groups": alone, "delta_m_tasks": 0.0, "validation_score": 0.0},
        ], "how": "all groupings of up to five tasks, scored on validation rows"},
        "history": history,
        "interference": make_interference(list(names), epochs, rng),
        "cost": {"seconds": 405.2, "by_method": {m["name"]: m["seconds"] for m in methods}, "single_task_seconds": 40.0,
                 "joint_seconds": 21.5},
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def build() -> Callable[..., dict[str, Any]]:
    return make_results

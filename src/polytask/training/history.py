"""The figures of every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.tasks import Tasks

Figures = Mapping[str, float | None]
Row = dict[str, float | None]

#: what is known of each task, and what trackers call it
OF_TASKS = {
    "train_loss": "train_loss",
    "validation_loss": "validation_loss",
    "explained_share": "explained_share",
    "weights": "weight",
    "gradient_norm": "gradient_norm",
}
OF_EPOCHS = ("epoch", "score", "seconds", "learning_rate")


def empty_history(tasks: Tasks) -> dict[str, Any]:
    """A history without epochs, as :class:`~polytask.training.loop.TrainResult` describes it."""
    history: dict[str, Any] = {key: [] for key in OF_EPOCHS}
    history |= {key: {name: [] for name in tasks} for key in OF_TASKS}
    history["validation"] = {n: {metric.name: [] for metric in t.metrics} for n, t in tasks.items()}
    history["level"] = None
    return history


def add_epoch(
    history: dict[str, Any], epoch: Figures, of_tasks: Mapping[str, Figures], metrics: Mapping[str, Figures]
) -> None:
    """Append one epoch's figures, None where one is missing.

    Args:
        history: as :func:`empty_history` made it.
        epoch: {key of OF_EPOCHS: value}.
        of_tasks: {key of OF_TASKS: {task: value}}.
        metrics: {task: {metric: value}}.
    """
    for key in OF_EPOCHS:
        history[key].append(epoch.get(key))
    for key in OF_TASKS:
        for task, values in history[key].items():
            values.append(of_tasks.get(key, {}).get(task))
    for task, each in history["validation"].items():
        for metric, values in each.items():
            values.append(metrics.get(task, {}).get(metric))


def row_of(history: Mapping[str, Any], i: int) -> Row:
    """The figures of the i-th epoch (from 0) as trackers read them: ``task/metric``."""
    row: Row = {key: history[key][i] for key in OF_EPOCHS}
    for task, metrics in history["validation"].items():
        row |= {f"{task}/{label}": history[key][task][i] for key, label in OF_TASKS.items()}
        row |= {f"{task}/{metric}": values[i] for metric, values in metrics.items()}
    return row


def means(table: npt.NDArray[np.float64], tasks: Tasks) -> dict[str, Figures]:
    """Losses, weights and gradient norms of the tasks, averaged over the steps that know them.

    Args:
        table: (steps, 3, tasks), NaN where unknown.
    """
    known = ~np.isnan(table)
    count = known.sum(0)
    mean = np.where(known, table, 0.0).sum(0) / np.maximum(count, 1)
    keys = ("train_loss", "weights", "gradient_norm")
    return {
        key: {name: float(mean[row, k]) if count[row, k] else None for k, name in enumerate(tasks)}
        for row, key in enumerate(keys)
    }


def add_diagnosis(history: dict[str, Any], epoch: int, diagnosis: Any) -> None:
    """Append a diagnosis: every array of it gets a leading axis of epochs; the sentences are the last one's."""
    seen = diagnosis.to_json()
    log = history.setdefault("interference", {"tasks": seen["tasks"], "epochs": []})
    log["epochs"].append(epoch)
    for key in ("cosine", "null", "conflict_rate", "null_conflict_rate", "norm", "p_value", "conflicting"):
        log.setdefault(key, []).append(seen[key])
    log["sentences"] = seen["sentences"]

"""What the predictions of all methods are worth: values, differences and Delta_m, each with its paired bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polytask.metrics import (
    Interval,
    affordable_replicates,
    draw_counts,
    draw_seeds,
    interval,
    mean_over_metrics,
    mean_over_tasks,
    mean_rank,
    over_seeds,
    relative_gain,
    replicates,
)
from polytask.tasks import Task, Tasks
from polytask.training.evaluation import best_constant

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Decoded = Mapping[str, Mapping[str, Array]]

LEAST_REFERENCE = 0.1


@dataclass(frozen=True)
class Columns:
    """All metrics of all tasks, side by side.

    Attributes:
        pairs: (task, metric) of each column.
        higher: whether higher is better.
        ratio: whether relative changes mean something: only these columns count for Delta_m.
        task_of: the task's position.
        floor: the least reference that gains are divided by: a tenth of what the best constant prediction reaches, where lower is
            better. Without it a task that every model solves (a log loss of 0.002 against 0.003) decides the verdict on the others.
    """

    pairs: tuple[tuple[str, str], ...]
    higher: npt.NDArray[np.bool_]
    ratio: npt.NDArray[np.bool_]
    task_of: npt.NDArray[np.intp]
    floor: Floats

    @classmethod
    def of(cls, tasks: Tasks, targets: Mapping[str, Array]) -> Columns:
        """The columns of the tasks, in their order, for judging rows with these labels."""
        listed = [(k, name, m) for k, (name, task) in enumerate(tasks.items()) for m in task.metrics]
        return cls(
            tuple((name, m.name) for _, name, m in listed),
            np.array([m.higher_is_better for _, _, m in listed]),
            np.array([m.ratio_scale for _, _, m in listed]),
            np.array([k for k, _, _ in listed]),
            LEAST_REFERENCE
            * np.nan_to_num(np.concatenate([_constant_values(t, targets[n]) for n, t in tasks.items()])),
        )

    def delta_m(self, values: Floats, reference: Floats) -> tuple[Floats, Floats]:
        """Delta_m over tasks and over metrics, in percent, higher is better: (..., columns) -> (...), (...)."""
        kept = self.ratio
        gains = relative_gain(values[..., kept], reference[..., kept], self.higher[kept], self.floor[kept])
        return mean_over_tasks(gains, self.task_of[self.ratio]), mean_over_metrics(gains)

    def gain_by_task(self, values: Floats, reference: Floats) -> Floats:
        """Mean gain of each task in percent: (columns,) -> (tasks,); NaN for a task without a metric on a ratio scale."""
        gains = np.where(self.ratio, relative_gain(values, reference, self.higher, self.floor), np.nan)
        return np.array(
            [float(mean_over_metrics(gains[self.task_of == k])) for k in range(int(self.task_of.max()) + 1)]
        )


def _constant_values(task: Task, target: Array) -> Floats:
    """What the best constant prediction reaches in every metric where lower is better; 0 elsewhere and without labels."""
    labels = torch.as_tensor(target)
    found = best_constant(task, (task.kind.output_size,), labels)
    if found is None:
        return np.zeros(len(task.metrics))
    known = target[labelled(target)]
    decoded = {what: t.numpy() for what, t in task.kind.decode(found[0].float().expand(len(known), -1)).items()}
    return np.array([0.0 if m.higher_is_better else m(known, decoded) for m in task.metrics])


def values_of(tasks: Tasks, targets: Mapping[str, Array], decoded: Decoded) -> Floats:
    """Every metric of every task on its labelled rows, shape (columns,); NaN where undefined or without a label."""
    found = []
    for name, task in tasks.items():
        known = labelled(targets[name])
        y, outputs = targets[name][known], {what: a[known] for what, a in decoded[name].items()}
        found += [metric(y, outputs) if known.any() else math.nan for metric in task.metrics]
    return np.array(found)


def labelled(target: Array) -> npt.NDArray[np.bool_]:
    """Which rows have a label: not NaN, or not negative."""
    known = ~np.isnan(target) if target.dtype.kind == "f" else target >= 0
    return np.asarray(known if known.ndim == 1 else known.any(1))


@dataclass
class Bench:
    """Judges methods on the same rows with the same bootstrap samples, so that every difference is paired.

    Args:
        tasks: what is predicted.
        targets: labels of the rows.
        n_seeds: seeds of every method.
        clusters: rows that belong together, where the split kept them together.
        seed: of the bootstrap.
    """

    tasks: Tasks
    targets: Mapping[str, Array]
    n_seeds: int
    clusters: Array | None = None
    seed: int = 0
    values: dict[str, Floats] = field(default_factory=dict)
    samples: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.columns = Columns.of(self.tasks, self.targets)
        rows = len(next(iter(self.targets.values())))
        n = affordable_replicates(rows)
        self._counts = draw_counts(rows, n, seed=self.seed, clusters=self.clusters)
        self._seeds = draw_seeds(self.n_seeds, n, seed=self.seed + 1)
        self._done: dict[int, tuple[Any, Floats]] = {}

    def add(self, method: str, by_seed: Sequence[Decoded]) -> None:
        """Judge a method's decoded outputs, one a seed."""
        self.values[method] = np.mean([values_of(self.tasks, self.targets, d) for d in by_seed], axis=0)
        self.samples[method] = over_seeds(np.stack([self._samples_of(d) for d in by_seed]), self._seeds)

    def _samples_of(self, decoded: Decoded) -> Floats:
        """Bootstrap replicates of every metric, shape (replicates, columns)."""
        found = []
        for name, task in self.tasks.items():
            outputs = decoded[name]
            key = id(outputs)  # groups and single tasks appear in several methods
            if key not in self._done:
                known = labelled(self.targets[name])
                y, mine = self.targets[name][known], {what: a[known] for what, a in outputs.items()}
                counts = self._counts[:, known]
                samples = np.stack([replicates(m, y, mine, counts) for m in task.metrics], axis=1)
                self._done[key] = (outputs, samples)  # the outputs are kept alive, or their id might be given again
            found.append(self._done[key][1])
        return np.concatenate(found, axis=1)

    def value(self, method: str, column: int) -> Interval:
        """A metric's value."""
        return interval(float(self.values[method][column]), self.samples[method][:, column])

    def difference(self, method: str, other: str, column: int) -> Interval:
        """``method`` minus ``other``, in the metric's own units."""
        mean = float(self.values[method][column] - self.values[other][column])
        return interval(mean, self.samples[method][:, column] - self.samples[other][:, column])

    def delta_m(self, method: str, reference: str) -> tuple[Interval, Interval]:
        """Delta_m over tasks and over metrics."""
        means = self.columns.delta_m(self.values[method], self.values[reference])
        samples = self.columns.delta_m(self.samples[method], self.samples[reference])
        over_tasks, over_metrics = (interval(float(m), s) for m, s in zip(means, samples, strict=True))
        return over_tasks, over_metrics

    def delta_m_samples(self, method: str, reference: str) -> Floats:
        """Bootstrap replicates of Delta_m over tasks, shape (replicates,)."""
        return self.columns.delta_m(self.samples[method], self.samples[reference])[0]

    def delta_m_difference(self, method: str, other: str, reference: str) -> Interval:
        """How much more Delta_m over tasks ``method`` has than ``other``."""
        (mean, _), (mean_other, _) = (
            self.columns.delta_m(self.values[m], self.values[reference]) for m in (method, other)
        )
        (own, _), (others, _) = (
            self.columns.delta_m(self.samples[m], self.samples[reference]) for m in (method, other)
        )
        return interval(float(mean - mean_other), own - others)

    def mean_ranks(self) -> dict[str, float]:
        """Mean rank of every method over all metrics, 1 is best."""
        ranks = mean_rank(np.stack(list(self.values.values())), self.columns.higher)
        return dict(zip(self.values, map(float, ranks), strict=True))

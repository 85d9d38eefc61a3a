r"""Delta_m: how much better, in percent, a model of several tasks does than its single-task references.

With the value :math:`M` of a metric and its reference :math:`B`, the relative gain is

.. math:: \Delta = 100 \, s \, \frac{M - B}{|B|}, \qquad s = +1 \text{ where higher is better, } -1 \text{ otherwise,}

so that **higher is better** whatever the metric. Two averages of the same gains are in use and can disagree in sign: the
mean over all metrics lets a task with many metrics count more, the mean over tasks of each task's mean does not. Both are
always given.

Sources: Maninis et al., CVPR 2019 (arXiv:1904.08918); Vandenhende et al. (arXiv:2004.13379). Tables of the Nash-MTL
lineage print the mean over metrics with the opposite sign (lower is better).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError

Floats = npt.NDArray[np.float64]
ByTask = Mapping[str, Mapping[str, float]]

ZERO = 1e-9  # a reference this small beside the value it is compared with is a zero that rounding has blurred


@dataclass(frozen=True)
class DeltaM:
    """Relative gains over the references, in percent, higher is better.

    Attributes:
        over_tasks: mean over tasks of each task's mean gain.
        over_metrics: mean over all metrics of all tasks.
        by_task: the mean gain of each task.
        excluded: (task, metric) pairs without a gain: a reference of zero, or a value that is undefined.
    """

    over_tasks: float
    over_metrics: float
    by_task: dict[str, float]
    excluded: tuple[tuple[str, str], ...]


def relative_gain(
    values: npt.ArrayLike, reference: npt.ArrayLike, higher_is_better: npt.ArrayLike, floor: npt.ArrayLike = 0.0
) -> Floats:
    """The gain of each value over its reference, in percent, higher is better.

    Args:
        values: any shape; its last axis usually runs over metrics.
        reference: broadcast against ``values``.
        higher_is_better: booleans, broadcast against ``values``.
        floor: the least number to divide by, broadcast against ``values``. A log loss that falls from 0.003 to 0.002 has not
            improved by a third in any sense that matters beside other tasks; 0 is the literature's definition.

    Returns:
        The broadcast shape. 0 where value and reference are both 0; NaN where only the reference is (at most 1e-9 of
        the value).
    """
    m, b, least = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (values, reference, floor)))
    sign = np.where(np.asarray(higher_is_better, dtype=bool), 1.0, -1.0)
    size = np.maximum(np.abs(b), least)
    usable = size > ZERO * np.abs(m)
    gain = 100.0 * sign * (m - b) / np.where(usable, size, 1.0)
    return np.where(usable, gain, np.where((m == 0) & (b == 0), 0.0, np.nan))


def mean_over_metrics(gains: Floats) -> Floats:
    """Mean over the last axis, the metrics, leaving undefined gains out; NaN where none is defined.

    Args:
        gains: shape (..., metrics).
    """
    defined = ~np.isnan(gains)
    total = np.where(defined, gains, 0.0).sum(-1)
    count = defined.sum(-1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def mean_over_tasks(gains: Floats, task_of: Sequence[int] | npt.NDArray[np.intp]) -> Floats:
    """Mean over tasks of each task's mean over its metrics.

    Args:
        gains: shape (..., metrics).
        task_of: the task's index of each metric, shape (metrics,).
    """
    index = np.asarray(task_of)
    by_task = np.stack([mean_over_metrics(gains[..., index == k]) for k in np.unique(index)], axis=-1)
    return mean_over_metrics(by_task)


def delta_m(values: ByTask, reference: ByTask, higher_is_better: Mapping[str, Mapping[str, bool]]) -> DeltaM:
    """Delta_m in both conventions, in percent, higher is better.

    Args:
        values: {task: {metric: value}}.
        reference: the single-task references, the same tasks and metrics.
        higher_is_better: {task: {metric: bool}}; its tasks and metrics are the ones that count.

    Raises:
        InputError: a task or metric that values or references lack.
    """
    pairs = [(task, metric) for task, metrics in higher_is_better.items() for metric in metrics]
    for task, metric in pairs:
        for what, table in (("value", values), ("reference", reference)):
            if metric not in table.get(task, {}):
                raise InputError(f"there is no {what} of {metric!r} for task {task!r}")
    gains = relative_gain(
        [values[t][m] for t, m in pairs],
        [reference[t][m] for t, m in pairs],
        [higher_is_better[t][m] for t, m in pairs],
    )
    names = list(higher_is_better)
    index = np.array([names.index(t) for t, _ in pairs])
    return DeltaM(
        over_tasks=float(mean_over_tasks(gains, index)),
        over_metrics=float(mean_over_metrics(gains)),
        by_task={n: float(mean_over_metrics(gains[index == k])) for k, n in enumerate(names)},
        excluded=tuple(pair for pair, gain in zip(pairs, gains, strict=True) if np.isnan(gain)),
    )

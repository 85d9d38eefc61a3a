"""Metrics of one task: a function on NumPy arrays that knows whether higher is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """What one task is judged by.

    Args:
        name: e.g. ``roc_auc``.
        function: ``(y_true, y_hat) -> float`` on the labelled examples only; y_true has shape (examples,) or (examples, labels).
        higher_is_better: the direction of improvement.
        reads: which decoded output is given as ``y_hat``: ``prediction`` (in the target's own units or class indices) or
            ``probability``, shape (examples,) for binary and (examples, classes) otherwise.
        ratio_scale: whether relative changes mean something. Metrics with a floating zero (R2, kappa) are shown but kept out of
            Delta_m, where dividing by a value near zero would decide the verdict.
    """

    name: str
    function: Callable[[Array, Array], float]
    higher_is_better: bool
    reads: Literal["prediction", "probability"] = "prediction"
    ratio_scale: bool = True

    def __call__(self, y_true: Array, decoded: Mapping[str, Array]) -> float:
        """The value on labelled examples; NaN where it is undefined there (AUC with one class present)."""
        try:
            return float(self.function(y_true, decoded[self.reads]))
        except ValueError:
            return float("nan")


def as_metric(metric: Any) -> Metric:
    """Accept a :class:`Metric` or a torchmetrics object (recognised by its methods: torchmetrics is never imported here).

    Raises:
        TypeError: neither of the two, or a torchmetrics object that does not say whether higher is better.
    """
    if isinstance(metric, Metric):
        return metric
    if not all(hasattr(metric, a) for a in ("update", "compute", "reset", "higher_is_better")):
        raise TypeError(f"a metric is a polytask.tasks.Metric or a torchmetrics object, not {type(metric).__name__}")
    name = type(metric).__name__
    if metric.higher_is_better is None:
        raise TypeError(
            f"the torchmetrics object {name} does not say whether higher is better: wrap it in a polytask.tasks.Metric"
        )

    def function(y_true: Array, y_hat: Array) -> float:
        import torch

        metric.reset()
        metric.update(torch.as_tensor(y_hat), torch.as_tensor(y_true))
        return float(metric.compute())

    reads: Literal["prediction", "probability"]
    reads = (
        "probability"
        if any(k in name.lower() for k in ("auroc", "averageprecision", "calibration", "logauc"))
        else "prediction"
    )
    return Metric(name, function, bool(metric.higher_is_better), reads)


def roc_auc(y: Array, p: Array) -> float:
    """Area under the ROC curve; the mean over labels for (examples, labels)."""
    from sklearn.metrics import roc_auc_score

    if y.ndim == 2:
        columns = [(y[:, j], p[:, j]) for j in range(y.shape[1])]
        scores = [roc_auc(t[~np.isnan(t)], q[~np.isnan(t)]) for t, q in columns if len(np.unique(t[~np.isnan(t)])) == 2]
        return float(np.mean(scores)) if scores else float("nan")
    return float(roc_auc_score(y, p)) if len(np.unique(y)) == 2 else float("nan")


def average_precision(y: Array, p: Array) -> float:
    """Area under the precision-recall curve (average precision)."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(y, p)) if y.any() else float("nan")


def log_loss(y: Array, p: Array) -> float:
    """Mean negative log probability of the true class, in nats."""
    if y.ndim == 2:
        q = np.clip(np.where(y == 1, p, 1 - p), 1e-15, 1)[~np.isnan(y)]
    elif p.ndim == 1:
        q = np.clip(np.where(y == 1, p, 1 - p), 1e-15, 1)
    else:
        q = np.clip(p[np.arange(len(y)), y.astype(int)], 1e-15, 1)
    return float(-np.log(q).mean())


def accuracy(y: Array, prediction: Array) -> float:
    """Share of exact hits."""
    return float((y == prediction).mean())


def macro_f1(y: Array, prediction: Array) -> float:
    """F1 averaged over the classes present in truth or prediction."""
    from sklearn.metrics import f1_score

    return float(f1_score(y, prediction, average="macro"))


def quadratic_kappa(y: Array, prediction: Array) -> float:
    """Cohen's kappa with quadratic weights."""
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(y.astype(int), prediction.astype(int), weights="quadratic"))


def rmse(y: Array, prediction: Array) -> float:
    """Root mean squared error, in the target's units."""
    return float(np.sqrt(np.mean((y - prediction) ** 2)))


def mae(y: Array, prediction: Array) -> float:
    """Mean absolute error, in the target's units (or ranks)."""
    return float(np.mean(np.abs(y - prediction)))


def r2(y: Array, prediction: Array) -> float:
    """Coefficient of determination."""
    variance = np.mean((y - y.mean()) ** 2)
    return float(1 - np.mean((y - prediction) ** 2) / variance) if variance > 0 else float("nan")


def poisson_deviance(y: Array, rate: Array) -> float:
    """Mean Poisson deviance 2 (y log(y / rate) - y + rate)."""
    from sklearn.metrics import mean_poisson_deviance

    return float(mean_poisson_deviance(y, np.maximum(rate, 1e-9)))


def pinball(quantiles: tuple[float, ...]) -> Callable[[Array, Array], float]:
    """Mean pinball loss over the given quantiles, for predictions of shape (examples, quantiles)."""
    q = np.asarray(quantiles)

    def function(y: Array, prediction: Array) -> float:
        error = y[:, None] - prediction.reshape(len(y), -1)
        return float(np.maximum(q * error, (q - 1) * error).mean())

    return function

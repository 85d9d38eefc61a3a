r"""Bootstrap replicates of a metric: its value under many reweightings of the same test rows, all at once.

A bootstrap sample of n rows is a vector of counts. Under counts :math:`w` most metrics are functions of a few weighted
sums :math:`\sum_i w_i c_i`, so that all replicates together are one matrix product; AUC and average precision need one
sort of the scores and cumulative sums of the counts. Metrics outside this list are evaluated sample by sample, and fewer
times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.tasks import metric as m
from polytask.tasks.metric import Metric

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.uint16]
Values = npt.NDArray[Any]

BLOCK = 4_000_000  # counts turned into floats at a time: 32 MB
SLOW_REPLICATES = 200


def draw_counts(n: int, replicates: int, *, seed: int, clusters: npt.ArrayLike | None = None) -> Counts:
    """How often each row is drawn in each bootstrap sample.

    Args:
        n: number of rows.
        replicates: number of samples.
        seed: of the draw; equal seeds give equal counts, which pairs everything computed from them.
        clusters: one label a row; rows of a cluster are drawn together, because they are not independent.

    Returns:
        Shape (replicates, n); each row sums to n, or to about n with clusters.
    """
    rng = np.random.default_rng(seed)
    codes = None if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    units = n if codes is None else int(codes.max()) + 1
    counts = np.empty((replicates, units), dtype=np.uint16)
    for b in range(replicates):
        counts[b] = np.bincount(rng.integers(0, units, units), minlength=units)
    return counts if codes is None else counts[:, codes]


def replicates(metric: Metric, y: Values, decoded: Mapping[str, Values], counts: Counts) -> Floats:
    """The metric's value in every bootstrap sample.

    Args:
        metric: what is computed.
        y: labels of the n labelled rows.
        decoded: ``prediction`` and ``probability`` for the same rows.
        counts: shape (replicates, n), from :func:`draw_counts`.

    Returns:
        Shape (replicates,); NaN where the metric is undefined, and beyond the first 200 where it has no fast form.

    Cost: O(replicates * n) for the metrics of polytask.
    """
    y_hat = np.asarray(decoded[metric.reads]) if metric.reads in decoded else np.empty(0)
    fast = _FAST.get(metric.function)
    if fast is None or y.ndim != 1:
        return _one_by_one(metric, y, decoded, counts)
    step = max(1, BLOCK // max(1, len(y)))
    with np.errstate(divide="ignore", invalid="ignore"):
        reweighted = fast(y, y_hat)
        blocks = [reweighted(counts[i : i + step].astype(np.float64)) for i in range(0, len(counts), step)]
    return np.concatenate(blocks)


def _one_by_one(metric: Metric, y: Values, decoded: Mapping[str, Values], counts: Counts) -> Floats:
    found = np.full(len(counts), np.nan)
    for b, count in enumerate(counts[:SLOW_REPLICATES]):
        rows = np.repeat(np.arange(len(y)), count)
        if len(rows):
            found[b] = metric(y[rows], {name: values[rows] for name, values in decoded.items()})
    return found


Reweighted = Callable[[Floats], Floats]  # counts (replicates, n) -> values (replicates,)


def _means(*columns: npt.ArrayLike) -> Callable[[Floats], Floats]:
    """Weighted means of per-row quantities: counts (replicates, n) -> (columns, replicates)."""
    stacked = np.stack([np.asarray(c, dtype=np.float64) for c in columns], axis=1)
    return lambda w: (w @ stacked / w.sum(1, keepdims=True)).T


def _mean(column: npt.ArrayLike) -> Reweighted:
    means = _means(column)
    return lambda w: means(w)[0]


def _rmse(y: Values, p: Values) -> Reweighted:
    mse = _mean((y - p) ** 2)
    return lambda w: np.sqrt(mse(w))


def _r2(y: Values, p: Values) -> Reweighted:
    center = y.mean()
    means = _means((y - p) ** 2, y - center, (y - center) ** 2)

    def value(w: Floats) -> Floats:
        error, first, second = means(w)
        return np.asarray(1 - error / (second - first**2))

    return value


def _log_loss(y: Values, p: Values) -> Reweighted:
    chosen = np.where(y == 1, p, 1 - p) if p.ndim == 1 else p[np.arange(len(y)), y.astype(int)]
    return _mean(-np.log(np.clip(chosen, 1e-15, 1)))


def _poisson_deviance(y: Values, rate: Values) -> Reweighted:
    mu = np.maximum(rate, 1e-9)
    return _mean(2 * (np.where(y > 0, y * np.log(np.where(y > 0, y, 1) / mu), 0) - y + mu))


def _quadratic_kappa(y: Values, p: Values) -> Reweighted:
    # the disagreement expected of independent raters is E y^2 + E p^2 - 2 E y E p
    means = _means((y - p) ** 2, y, p, y.astype(float) ** 2, p.astype(float) ** 2)

    def value(w: Floats) -> Floats:
        observed, ey, ep, ey2, ep2 = means(w)
        return np.asarray(1 - observed / (ey2 + ep2 - 2 * ey * ep))

    return value


def _macro_f1(y: Values, p: Values) -> Reweighted:
    classes = np.union1d(y, p)
    hit = _means(*[(y == c) & (p == c) for c in classes])
    seen = _means(*[(y == c).astype(float) + (p == c) for c in classes])

    def value(w: Floats) -> Floats:
        total = seen(w)
        present = total > 0
        f1 = np.where(present, 2 * hit(w) / np.where(present, total, 1), 0)
        return np.asarray(f1.sum(0) / present.sum(0))

    return value


def _roc_auc(y: Values, p: Values) -> Reweighted:
    order = np.argsort(p, kind="stable")
    positive = (y[order] == 1).astype(float)
    starts = _group_starts(p[order])

    def value(w: Floats) -> Floats:
        pos, neg = _grouped(w[:, order], positive, starts)
        below = neg.cumsum(1) - neg
        wins = (pos * (below + neg / 2)).sum(1)
        return np.asarray(wins / (pos.sum(1) * neg.sum(1)))

    return value


def _average_precision(y: Values, p: Values) -> Reweighted:
    order = np.argsort(-p, kind="stable")
    positive = (y[order] == 1).astype(float)
    starts = _group_starts(p[order])

    def value(w: Floats) -> Floats:
        pos, neg = _grouped(w[:, order], positive, starts)
        hits = pos.cumsum(1)
        precision = hits / np.maximum(hits + neg.cumsum(1), 1)
        return np.asarray((pos * precision).sum(1) / hits[:, -1])

    return value


def _group_starts(scores: Values) -> npt.NDArray[np.intp]:
    """Where each run of tied scores begins, in sorted scores."""
    return np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])


def _grouped(w: Floats, positive: Floats, starts: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Counts of positives and negatives, summed over each run of tied scores."""
    pos, neg = w * positive, w * (1 - positive)
    if len(starts) == w.shape[1]:
        return pos, neg
    return np.add.reduceat(pos, starts, axis=1), np.add.reduceat(neg, starts, axis=1)


_FAST: dict[Callable[..., float], Callable[[Values, Values], Reweighted]] = {
    m.roc_auc: _roc_auc,
    m.average_precision: _average_precision,
    m.log_loss: _log_loss,
    m.accuracy: lambda y, p: _mean(y == p),
    m.macro_f1: _macro_f1,
    m.quadratic_kappa: _quadratic_kappa,
    m.rmse: _rmse,
    m.mae: lambda y, p: _mean(np.abs(y - p)),
    m.r2: _r2,
    m.poisson_deviance: _poisson_deviance,
}

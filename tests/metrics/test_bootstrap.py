"""The bootstrap: fast replicates equal slow ones, intervals cover, pairing helps, seeds reproduce."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from polytask.metrics import affordable_replicates, draw_counts, draw_seeds, interval, over_seeds, replicates
from polytask.metrics.replicates import SLOW_REPLICATES
from polytask.tasks import Binary, Count, Metric, Multiclass, Ordinal, Quantile, Regression

RNG = np.random.default_rng(1)
N = 60


def case(kind: str) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[Metric, ...]]:
    if kind == "binary":  # rounded scores: many ties
        return RNG.integers(0, 2, N).astype(float), {"probability": RNG.random(N).round(1)}, Binary().metrics
    if kind == "regression":
        return RNG.normal(100, 3, N), {"prediction": RNG.normal(100, 3, N)}, Regression().metrics
    if kind == "count":
        return RNG.poisson(1.5, N).astype(float), {"prediction": RNG.gamma(2, 1, N)}, Count().metrics
    if kind == "quantile":
        return RNG.normal(size=N), {"prediction": np.sort(RNG.normal(size=(N, 3)), 1)}, Quantile().metrics
    p = RNG.dirichlet(np.ones(4), N)
    decoded = {"probability": p, "prediction": p.argmax(1)}
    return RNG.integers(0, 4, N), decoded, Multiclass(4).metrics if kind == "multiclass" else Ordinal(4).metrics


@pytest.mark.parametrize("kind", ["binary", "regression", "count", "quantile", "multiclass", "ordinal"])
def test_every_metric_under_counts_equals_the_metric_of_the_repeated_rows(kind: str) -> None:
    y, decoded, metrics = case(kind)
    counts = draw_counts(N, 30, seed=3)
    for metric in metrics:
        slow = [
            metric(y[rows], {k: v[rows] for k, v in decoded.items()})
            for rows in (np.repeat(np.arange(N), c) for c in counts)
        ]
        np.testing.assert_allclose(replicates(metric, y, decoded, counts), slow, rtol=1e-9, err_msg=metric.name)


def test_own_metrics_are_bounded_in_cost() -> None:
    calls = []

    def median_error(y: np.ndarray, p: np.ndarray) -> float:
        calls.append(len(y))
        return float(np.median(np.abs(y - p)))

    y = RNG.normal(size=N)
    found = replicates(Metric("median", median_error, False), y, {"prediction": y + 1}, draw_counts(N, 500, seed=0))
    assert len(calls) == SLOW_REPLICATES
    np.testing.assert_allclose(found[:SLOW_REPLICATES], 1)
    assert np.isnan(found[SLOW_REPLICATES:]).all()
    assert interval(1.0, found).low == pytest.approx(1.0)


def test_auc_is_undefined_where_a_sample_has_one_class() -> None:
    y = np.array([1.0, 0.0, 0.0])
    counts = np.array([[3, 0, 0], [1, 1, 1], [0, 2, 1]], dtype=np.uint16)
    auc = replicates(Binary().metrics[0], y, {"probability": np.array([0.9, 0.1, 0.2])}, counts)
    assert np.isnan(auc[[0, 2]]).all()
    assert auc[1] == 1.0


def test_counts_are_bootstrap_samples() -> None:
    counts = draw_counts(500, 400, seed=0)
    assert (counts.sum(1) == 500).all()
    assert (counts == 0).mean() == pytest.approx(math.exp(-1), rel=0.02)
    np.testing.assert_array_equal(counts, draw_counts(500, 400, seed=0))
    assert (counts != draw_counts(500, 400, seed=1)).any()


def test_rows_of_a_cluster_are_drawn_together() -> None:
    counts = draw_counts(6, 50, seed=0, clusters=["a", "a", "b", "b", "b", "c"])
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 2] == counts[:, 4]).all()
    assert (counts[:, [0, 2, 5]].sum(1) == 3).all()


def test_clusters_widen_the_interval_of_dependent_rows() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20), 30)
    error = rng.normal(size=20)[clusters]
    mae = Regression().metrics[1]
    widths = []
    for labels in (None, clusters):
        found = interval(
            0.0, replicates(mae, error, {"prediction": np.zeros(600)}, draw_counts(600, 400, seed=0, clusters=labels))
        )
        widths.append(found.high - found.low)
    assert widths[1] > 3 * widths[0]  # 30 copies of a row are one row: sqrt(30) = 5.5


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_the_spread_of_seeds_is_not_understated(n_seeds: int) -> None:
    values = np.random.default_rng(4).normal(size=n_seeds)
    weights = draw_seeds(n_seeds, 40_000, seed=0)
    np.testing.assert_allclose(weights.sum(1), 1)
    found = over_seeds(np.repeat(values[:, None], 40_000, axis=1), weights)
    assert found.mean() == pytest.approx(values.mean(), abs=4 * values.std() / 200)
    assert found.var() == pytest.approx(values.var(ddof=1) / n_seeds, rel=0.05)


def test_one_seed_adds_no_spread() -> None:
    by_seed = np.random.default_rng(0).normal(size=(1, 10))
    np.testing.assert_array_equal(over_seeds(by_seed, draw_seeds(1, 10, seed=0)), by_seed[0])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    mae = Regression().metrics[1]
    truth, hits, trials = math.sqrt(2 / math.pi), 0, 200
    for trial in range(trials):
        error = rng.normal(size=200)
        found = interval(
            0.0, replicates(mae, error, {"prediction": np.zeros(200)}, draw_counts(200, 300, seed=trial)), 0.9
        )
        hits += found.low <= truth <= found.high
    assert 0.83 <= hits / trials <= 0.96  # binomial noise of 200 trials around 0.9 is 0.02


def test_a_paired_difference_is_sharper_than_two_values() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=400)
    first, second = y + rng.normal(size=400), y + rng.normal(size=400) * 0.05
    second = first + (second - y)  # nearly the same errors
    counts = draw_counts(400, 500, seed=0)
    rmse = Regression().metrics[0]
    a, b = (replicates(rmse, y, {"prediction": p}, counts) for p in (first, second))
    assert (a - b).std() < 0.2 * min(a.std(), b.std())


def test_interval_in_json_and_in_words() -> None:
    gain = interval(1.0, np.linspace(0.5, 1.5, 101))
    assert gain.excludes_zero
    assert not interval(0.1, np.linspace(-1, 1, 101)).excludes_zero
    assert not dataclasses.replace(gain, low=math.nan, high=math.nan).excludes_zero
    assert interval(1.0, np.full(5, np.nan)).to_json() == {"mean": 1.0, "low": None, "high": None}


def test_large_tables_get_fewer_replicates_but_never_too_few() -> None:
    assert affordable_replicates(100) == 1000
    assert affordable_replicates(10**7) == 200
    sizes = [affordable_replicates(n) for n in (10, 10_000, 20_000, 50_000)]
    assert sizes == sorted(sizes, reverse=True)

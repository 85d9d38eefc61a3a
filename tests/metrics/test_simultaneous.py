"""Intervals that hold for many comparisons at once."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.metrics import simultaneous_intervals


def experiment(rng: np.random.Generator, n: int, common: float) -> tuple[np.ndarray, np.ndarray]:
    """Differences whose truth is 0, with a common part, and bootstrap samples around them."""

    def draw(size: int) -> np.ndarray:
        return rng.normal(size=(size, n)) * np.linspace(0.5, 2, n) + common * rng.normal(size=(size, 1))

    d = draw(1)[0]
    return d, d + draw(1000)


@pytest.mark.parametrize("common", [0.0, 3.0])
def test_all_hold_together_as_often_as_they_say(common: float) -> None:
    rng = np.random.default_rng(0)
    trials = 300
    held, each = 0, 0
    for _ in range(trials):
        d, samples = experiment(rng, 20, common)
        held += all(i.low <= 0 <= i.high for i in simultaneous_intervals(d, samples))
        low, high = np.quantile(samples, [0.025, 0.975], axis=0)
        each += bool(((low <= 0) & (high >= 0)).all())
    assert 0.91 < held / trials < 0.985
    assert each / trials < held / trials - 0.05  # one interval at a time misses something far more often


def test_a_single_comparison_is_the_ordinary_interval() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, (4000, 1))
    (found,) = simultaneous_intervals([3.0], samples)
    assert found.mean == 3.0
    assert found.high - found.mean == pytest.approx(1.96 * 2.0, rel=0.06)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_no_spread_and_no_samples() -> None:
    (found,) = simultaneous_intervals([1.0], np.ones((10, 1)))
    assert (found.low, found.high) == (1.0, 1.0)
    (unknown,) = simultaneous_intervals([1.0], np.full((10, 1), np.nan))
    assert np.isnan([unknown.low, unknown.high]).all()


def test_scale_of_one_comparison_leaves_the_others_alone() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(1000, 3))
    one = simultaneous_intervals([0.0, 0.0, 0.0], samples)
    other = simultaneous_intervals([0.0, 0.0, 0.0], samples * np.array([1e6, 1, 1e-6]))
    assert other[1].high == pytest.approx(one[1].high)
    assert other[0].high == pytest.approx(1e6 * one[0].high)

"""Delta_m: published tables, sign, scale, zeros; mean rank; normalised scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.errors import InputError
from polytask.metrics import (
    delta_m,
    mean_over_metrics,
    mean_over_tasks,
    mean_rank,
    normalised_score,
    ranks,
    relative_gain,
)

TASKS = {
    "segmentation": {"miou": True, "pixel_accuracy": True},
    "depth": {"absolute": False, "relative": False},
    "normals": {"mean": False, "median": False, "within_11": True, "within_22": True, "within_30": True},
}
# NYUv2 with the MTAN-SegNet harness, as printed by Nash-MTL and the papers after it
SINGLE = (38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15)
PUBLISHED = {  # the nine metrics and the Delta_m printed beside them, where lower is better
    "LS": ((39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08), 5.59),
    "RLW": ((37.17, 63.77, 0.5759, 0.2410, 28.27, 24.18, 22.26, 47.05, 60.62), 7.78),
    "MGDA": ((30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36), 1.38),
    "CAGrad": ((39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58), 0.20),
    "Nash-MTL": ((40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.4, 55.47, 68.15), -4.04),
    "FAMO": ((38.88, 64.90, 0.5474, 0.2194, 25.06, 19.57, 29.21, 56.61, 68.98), -4.10),
}


def table(row: tuple[float, ...]) -> dict[str, dict[str, float]]:
    numbers = iter(row)
    return {task: {metric: next(numbers) for metric in metrics} for task, metrics in TASKS.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_is_recomputed(name: str) -> None:
    row, printed = PUBLISHED[name]
    # the rows are means over three seeds rounded to four digits, the printed number is the mean of unrounded ones
    assert delta_m(table(row), table(SINGLE), TASKS).over_metrics == pytest.approx(-printed, abs=0.06)


def test_the_two_averages_of_one_row_disagree_in_sign() -> None:
    found = delta_m(table(PUBLISHED["LS"][0]), table(SINGLE), TASKS)
    assert round(found.over_metrics, 2) == -5.59
    assert round(found.over_tasks, 2) == 0.88
    assert found.by_task["depth"] > 0 > found.by_task["normals"]
    assert found.excluded == ()


positive = st.floats(1e-3, 1e3)


@given(positive, positive, st.booleans(), st.floats(1e-9, 1e9))
def test_the_gain_knows_no_unit_and_flips_with_the_direction(
    value: float, reference: float, higher: bool, unit: float
) -> None:
    gain = float(relative_gain(value, reference, higher))
    assert math.isclose(float(relative_gain(value * unit, reference * unit, higher)), gain, rel_tol=1e-9, abs_tol=1e-9)
    assert float(relative_gain(value, reference, not higher)) == -gain
    assert (gain > 0) == ((value > reference) == higher and value != reference)


@given(positive, st.booleans())
def test_the_reference_gains_nothing_over_itself(value: float, higher: bool) -> None:
    assert float(relative_gain(value, value, higher)) == 0.0


def test_a_better_value_is_a_gain_below_zero_too() -> None:
    # log likelihoods are negative: -1 is better than -2
    assert float(relative_gain(-1.0, -2.0, True)) == 50.0


def test_a_zero_reference_is_left_out_and_named() -> None:
    judged = {"a": {"mae": False, "rmse": False}, "b": {"mae": False}}
    reference = {"a": {"mae": 0.0, "rmse": 2.0}, "b": {"mae": 1.0}}
    found = delta_m({"a": {"mae": 0.5, "rmse": 1.0}, "b": {"mae": 1.0}}, reference, judged)
    assert found.excluded == (("a", "mae"),)
    assert (found.over_tasks, found.over_metrics) == (25.0, 25.0)
    blurred = {"a": {"mae": 1e-17, "rmse": 2.0}, "b": {"mae": 1.0}}
    assert delta_m({"a": {"mae": 0.5, "rmse": 1.0}, "b": {"mae": 1.0}}, blurred, judged).excluded == (("a", "mae"),)
    assert float(relative_gain(0.0, 0.0, False)) == 0.0


def test_an_undefined_value_is_left_out_and_a_lost_one_refused() -> None:
    judged = {"a": {"auc": True}, "b": {"auc": True}}
    found = delta_m({"a": {"auc": math.nan}, "b": {"auc": 0.6}}, {"a": {"auc": 0.5}, "b": {"auc": 0.5}}, judged)
    assert found.over_tasks == pytest.approx(20.0)
    assert math.isnan(found.by_task["a"])
    with pytest.raises(InputError, match="no value of 'auc' for task 'b'"):
        delta_m({"a": {"auc": 0.5}}, {"a": {"auc": 0.5}, "b": {"auc": 0.5}}, judged)


def test_many_rows_of_gains_are_averaged_as_one_by_one() -> None:
    gains = np.random.default_rng(0).normal(size=(7, 9))
    task_of = [0, 0, 1, 1, 2, 2, 2, 2, 2]
    gains[3, 4] = np.nan
    one_by_one = [np.nanmean([np.nanmean(row[:2]), np.nanmean(row[2:4]), np.nanmean(row[4:])]) for row in gains]
    np.testing.assert_allclose(mean_over_tasks(gains, task_of), one_by_one)
    np.testing.assert_allclose(mean_over_metrics(gains), np.nanmean(gains, axis=1))


def test_ranks_by_hand_with_ties_and_undefined_values() -> None:
    values = [[0.9, 1.0], [0.9, 2.0], [0.5, math.nan]]  # accuracy (up), error (down)
    np.testing.assert_array_equal(ranks(values, [True, False]), [[1.5, 1], [1.5, 2], [3, 3]])
    np.testing.assert_array_equal(mean_rank(values, [True, False]), [1.25, 1.75, 3])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_ranks_keep_their_sum_and_forget_every_monotone_scale(methods: int, metrics: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, (methods, metrics)).astype(float)
    up = rng.integers(0, 2, metrics).astype(bool)
    np.testing.assert_allclose(ranks(values, up).sum(0), methods * (methods + 1) / 2)
    np.testing.assert_array_equal(ranks(np.exp(values), up), ranks(values, up))
    np.testing.assert_array_equal(ranks(-values, ~up), ranks(values, up))


def test_normalised_scores() -> None:
    np.testing.assert_allclose(normalised_score([0.5, 0.7, 0.9, 1.0], 0.5, 0.9), [0, 0.5, 1, 1.25])
    assert float(normalised_score(2.0, 4.0, 3.0)) == 2.0  # an error: lower is better, twice the way
    with pytest.raises(InputError, match="same value"):
        normalised_score(1.0, 0.5, 0.5)

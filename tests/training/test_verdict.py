"""The verdict claims what the intervals allow, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest

from polytask.metrics import Interval
from polytask.training.verdict import Evidence, effect, judge

SURE_GAIN, SURE_LOSS, NOISE = Interval(2.0, 1.0, 3.0), Interval(-2.0, -3.0, -1.0), Interval(0.5, -1.0, 2.0)
LABELS = {
    "single_task": "Single-task models",
    "equal": "Equal weighting",
    "scalarization": "Tuned scalarization",
    "famo": "FAMO",
    "groups": "Groups of tasks",
}
SEEN = Evidence(
    chosen="famo",
    best="famo",
    joint="famo",
    labels=LABELS,
    groups=[["a", "b", "c"]],
    validation={"single_task": 0.0, "equal": 0.4, "scalarization": 0.7, "famo": 1.2},
    gain=(SURE_GAIN, SURE_GAIN),
    against={"equal": NOISE, "scalarization": NOISE},
    effects={"a": "gains", "b": "indifferent", "c": "loses"},
    differences={"a": ("rmse", SURE_LOSS), "b": ("roc_auc", NOISE), "c": ("mae", SURE_GAIN)},
    seconds={"single_task": 30.0, "equal": 9.0, "scalarization": 10.0, "famo": 12.0},
    seeds=3,
)


def but(**changes: object) -> Evidence:
    return dataclasses.replace(SEEN, **changes)


@pytest.mark.parametrize("higher", [True, False])
def test_an_effect_needs_an_interval_on_one_side_of_zero(higher: bool) -> None:
    assert effect(SURE_GAIN, higher) == ("gains" if higher else "loses")
    assert effect(SURE_LOSS, higher) == ("loses" if higher else "gains")
    assert effect(NOISE, higher) == "indifferent"
    assert effect(Interval(1.0, float("nan"), float("nan")), higher) == "indifferent"
    assert effect(Interval(1.0, 0.0, 2.0), higher) == "indifferent"


def test_a_clear_gain_is_said_with_its_interval_and_each_target() -> None:
    text = judge(SEEN)["text"]
    assert text.startswith("Learn the 3 targets together, with FAMO: the best score on validation rows.")
    assert "+2.00 % [+1.00, +3.00]" in text
    assert "beyond noise: a gains; c loses; b shows no clear change." in text


def test_noise_is_called_noise() -> None:
    found = judge(but(gain=(NOISE, NOISE)))
    assert "within noise" in found["text"]
    assert "beyond noise" not in found["text"]
    assert any("cannot tell it from single-task" in r and "1 network instead of 3" in r for r in found["reasons"])
    rivals = [r for r in found["reasons"] if "cannot be told from" in r]
    assert len(rivals) == 2
    assert not any(" better than " in r or " worse than " in r for r in found["reasons"])


def test_a_rival_beyond_noise_is_said_to_be_better_or_worse() -> None:
    found = judge(but(against={"equal": SURE_GAIN, "scalarization": SURE_LOSS}))["reasons"]
    assert any("FAMO is better than equal weighting" in r for r in found)
    assert any("FAMO is worse than tuned scalarization" in r for r in found)


def test_test_rows_that_contradict_the_choice_are_not_hushed_up() -> None:
    together = judge(but(gain=(SURE_LOSS, SURE_LOSS)))["reasons"]
    assert any(r.startswith("Beware") and "worse than single-task models" in r for r in together)
    apart = but(chosen="single_task", groups=[["a"], ["b"], ["c"]])
    found = judge(apart)
    assert found["method"] == "single_task"
    assert found["joint"] == "famo"
    assert found["text"].startswith("Learn the 3 targets apart")
    assert "learning together (FAMO) is worth" in found["text"]
    assert any(r.startswith("Beware") and "better than single-task models" in r for r in found["reasons"])


def test_the_simplest_method_near_the_best_is_called_that() -> None:
    text = judge(but(chosen="equal", joint="equal"))["text"]
    assert (
        "with equal weighting: the simplest way within one standard error of the best score on validation rows (that of FAMO)"
        in text
    )


def test_groups_are_spelt_out() -> None:
    grouped = but(
        chosen="groups",
        best="groups",
        joint="groups",
        groups=[["a", "b"], ["c"]],
        seconds={**SEEN.seconds, "groups": 20.0},
    )
    found = judge(grouped)
    assert found["text"].startswith("Learn a and b together; c apart: the best score on validation rows.")
    assert found["groups"] == [["a", "b"], ["c"]]


def test_two_averages_that_disagree_and_a_single_seed_are_pointed_out() -> None:
    found = judge(but(gain=(SURE_GAIN, SURE_LOSS), seeds=1))["reasons"]
    assert any("two averages disagree" in r for r in found)
    assert any("one seed" in r for r in found)
    plain = judge(SEEN)["reasons"]
    assert not any("disagree" in r or "one seed" in r for r in plain)


def test_cost_is_always_said() -> None:
    assert any("12.0 s for FAMO and 30.0 s for all single-task models" in r for r in judge(SEEN)["reasons"])

"""What a study plans before it trains: trials, methods, jobs, groupings; and what it makes of scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import InputError
from polytask.tasks import Binary, Regression, Task, Tasks
from polytask.training import groups as g
from polytask.training.judging import Bench, Columns, values_of
from polytask.training.protocol import Job, Settings, alone, balancing_methods, references, scalarization, trial_weights


@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 5))
def test_trials_begin_with_equal_weights_and_keep_the_sum(n: int, trials: int, seed: int) -> None:
    found = trial_weights(n, trials, seed)
    assert len(found) == trials
    assert found[0] == (1.0,) * n
    assert found == trial_weights(n, trials, seed)
    for weights in found:
        assert sum(weights) == pytest.approx(n, rel=1e-3)
        assert max(weights) / min(weights) <= 25 * 1.01


def test_more_trials_extend_fewer() -> None:
    assert trial_weights(3, 8, 0)[:4] == trial_weights(3, 4, 0)


def test_equal_weights_are_trained_once() -> None:
    _, equal = references(3)
    assert scalarization((1.0, 1.0, 1.0)).jobs(0) == equal.jobs(0)
    assert scalarization((2.0, 0.5, 0.5)).jobs(0) != equal.jobs(0)


def test_names_tell_jobs_apart() -> None:
    jobs = [
        *(m.jobs(s)[0] for m in (scalarization((2.0, 0.5, 0.5)), *balancing_methods(["auto"], 3)) for s in (0, 1)),
        alone(0, 0), alone(1, 0), Job((0, 1), "equal", (), 0),
    ]  # fmt: skip
    assert len({j.name for j in jobs}) == len(jobs)
    assert all("/" not in j.name for j in jobs)


def test_the_automatic_choice_is_small_cheapest_first_and_says_why() -> None:
    found = balancing_methods(["auto"], 3)
    assert [m.name for m in found] == ["log_losses", "famo", "db_mtl"]
    assert all(m.why for m in found)
    assert [m.name for m in balancing_methods(["auto"], 3, short=True)] == ["log_losses"]


def test_methods_asked_for_are_found_by_alias_and_once() -> None:
    assert [m.name for m in balancing_methods(["MGDA_UB", "mgda", "equal", "auto"], 2, short=True)] == [
        "mgda",
        "log_losses",
    ]
    variants = balancing_methods(["LOG_FAMO", "famo", "log-famo", "PSMGD"], 2)
    assert [(m.name, m.balancer, dict(m.options)) for m in variants] == [
        ("log_famo", "famo", {"log_losses": True}),
        ("famo", "famo", {}),
        ("psmgd", "mgda", {"every": 4}),
    ]
    with pytest.raises(InputError, match="no balancing method called 'mgd4'"):
        balancing_methods(["mgd4"], 2)


def test_settings_survive_json() -> None:
    made = Settings(targets=("a", "b"), kinds={"a": "count"}, by="g", seeds=(3, 5), training={"epochs": 7})
    again = Settings.from_json(made.to_json())
    assert again.to_json() == made.to_json()
    assert again.config.epochs == 7
    with pytest.raises(InputError, match="no setting 'speed'"):
        Settings.from_json({**made.to_json(), "speed": 1})


@pytest.mark.parametrize(("n", "bell"), [(1, 1), (2, 2), (3, 5), (4, 15), (5, 52), (8, 4140)])
def test_all_groupings_are_there_once(n: int, bell: int) -> None:
    found = list(g.all_groupings(n))
    assert len(set(found)) == len(found) == bell
    assert all(sorted(k for group in grouping for k in group) == list(range(n)) for grouping in found)


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_every_candidate_can_be_scored_from_what_is_trained(n: int) -> None:
    gains = {group: dict.fromkeys(group, 1.0) for group in [*g.groups_to_train(n, None), tuple(range(n))]}
    for grouping in g.candidates(n, None):
        together = sum(len(group) for group in grouping if len(group) > 1)
        assert g.gain_of(grouping, gains) == pytest.approx(together / n)
    assert len(g.groups_to_train(n, None)) == {3: 3, 4: 6, 5: 10, 8: 28}[n]


def test_the_best_grouping_keeps_foes_apart() -> None:
    friend = {(0, 1): 2.0, (2, 3): 1.0}
    gains = {p: dict.fromkeys(p, friend.get(p, -3.0)) for p in g.groups_to_train(4, None)}
    gains[(0, 1, 2, 3)] = dict.fromkeys(range(4), -1.0)
    best = max(g.candidates(4, None), key=lambda c: g.gain_of(c, gains))
    assert sorted(best) == [(0, 1), (2, 3)]


def test_many_tasks_are_grouped_by_their_gradients() -> None:
    cosine = np.full((10, 10), -0.2)
    cosine[:6, :6] = cosine[6:, 6:] = 0.8
    found = g.candidates(10, cosine)
    assert (tuple(range(6)), tuple(range(6, 10))) in found
    assert (tuple(range(10)),) in found
    assert tuple((k,) for k in range(10)) in found
    assert g.candidates(10, None) == [(tuple(range(10)),), tuple((k,) for k in range(10))]


TASKS = Tasks([Task("y", Regression()), Task("z", Binary())])


def decoded(rng: np.random.Generator, targets: dict[str, np.ndarray], noise: float) -> dict[str, dict[str, np.ndarray]]:
    y, z = np.nan_to_num(targets["y"]), np.nan_to_num(targets["z"])
    p = 1 / (1 + np.exp(-(2 * z - 1 + noise * rng.normal(size=len(z)))))
    return {
        "y": {"prediction": y + noise * rng.normal(size=len(y))},
        "z": {"prediction": (p > 0.5) * 1, "probability": p},
    }


def labels(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, z = rng.normal(size=n), (rng.random(n) < 0.4).astype(float)
    y[rng.random(n) < 0.3] = np.nan
    z[rng.random(n) < 0.2] = np.nan
    return {"y": y, "z": z}


def test_metrics_are_taken_on_labelled_rows() -> None:
    targets = labels(200)
    found = decoded(np.random.default_rng(1), targets, 0.5)
    values = values_of(TASKS, targets, found)
    known = ~np.isnan(targets["y"])
    rmse = np.sqrt(np.mean((targets["y"][known] - found["y"]["prediction"][known]) ** 2))
    assert values[0] == pytest.approx(rmse)
    assert len(values) == len(Columns.of(TASKS, targets).pairs) == 6


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_a_method_differs_from_itself_by_nothing_and_from_a_better_one_by_something(seed: int) -> None:
    targets = labels(400, seed)
    rng = np.random.default_rng(seed)
    bench = Bench(TASKS, targets, 2)
    bench.add("single_task", [decoded(rng, targets, 1.0) for _ in range(2)])
    bench.add("good", [decoded(rng, targets, 0.3) for _ in range(2)])
    own = bench.difference("good", "good", 0)
    assert (own.mean, own.low, own.high) == (0, 0, 0)
    gain, _ = bench.delta_m("good", "single_task")
    assert gain.low > 0
    assert gain.low < gain.mean < gain.high
    none, _ = bench.delta_m("single_task", "single_task")
    assert (none.mean, none.low, none.high) == (0, 0, 0)
    ahead = bench.delta_m_difference("good", "single_task", "single_task")
    assert (ahead.mean, ahead.low, ahead.high) == (gain.mean, gain.low, gain.high)
    assert bench.mean_ranks() == {"single_task": 2.0, "good": 1.0}
    again = Bench(TASKS, targets, 2)
    again.add("good", [decoded(np.random.default_rng(5), targets, 0.3)] * 2)
    more = Bench(TASKS, targets, 2)
    more.add("good", [decoded(np.random.default_rng(5), targets, 0.3)] * 2)
    assert again.value("good", 3) == more.value("good", 3)


def test_a_task_that_every_model_solves_does_not_decide_on_the_others() -> None:
    """Log losses of 0.002 and 0.003 beside an entropy of 0.7: a third worse by ratio, nothing beside a real loss elsewhere."""
    rng = np.random.default_rng(0)
    solved = (rng.random(2000) < 0.5).astype(float)
    noisy = rng.normal(size=2000)
    tasks = Tasks([Task("solved", Binary()), Task("noisy", Regression())])
    targets = {"solved": solved, "noisy": noisy}

    def outputs(log_loss: float, error: float) -> dict[str, dict[str, np.ndarray]]:
        p = np.where(solved == 1, np.exp(-log_loss), 1 - np.exp(-log_loss))
        return {
            "solved": {"probability": p, "prediction": (p > 0.5).astype(int)},
            "noisy": {"prediction": noisy + error},
        }

    bench = Bench(tasks, targets, 1)
    bench.add("single_task", [outputs(0.002, 0.50)])
    bench.add("joint", [outputs(0.003, 0.49)])
    gain, _ = bench.delta_m("joint", "single_task")
    entropy = np.log(2)
    expected = (100 * -0.001 / (0.1 * entropy) / 3 + 100 * 0.01 / 0.5) / 2
    assert gain.mean == pytest.approx(expected, rel=0.02)
    assert gain.mean > 0

"""The arithmetic of step benchmarks on a clock that the test moves, and what contenders do to a workload."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polytask.benchmark import Contender, Workload, ours
from polytask.benchmark.contenders import plain
from polytask.benchmark.steps import bench_steps, measured
from polytask.benchmark.timing import REPEATS, Ratio, ratios
from polytask.errors import InputError


class Clock:
    """Time that passes only while steps are taken, at the pace of the machine's mood."""

    def __init__(self, slowness: Callable[[int], float] = lambda _: 1.0) -> None:
        self.now, self.calls, self.slowness = 0.0, 0, slowness

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float) -> Callable[[], None]:
        def take() -> None:
            self.now += seconds * self.slowness(self.calls)
            self.calls += 1

        return take


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 5))
def test_a_quiet_machine_gives_the_exact_ratio(mine: float, reference: float, rounds: int) -> None:
    clock = Clock()
    found = ratios({"a": clock.step(mine)}, clock.step(reference), rounds, clock)
    assert found["a"] == pytest.approx([mine / reference] * rounds)


def test_a_machine_that_grows_slow_from_round_to_round_changes_no_ratio() -> None:
    steps_a_round = 2 * REPEATS * 2
    clock = Clock(lambda call: 1.0 + 9.0 * (call // steps_a_round))
    found = ratios({"a": clock.step(3.0), "b": clock.step(1.0)}, clock.step(2.0), 4, clock)
    assert found["a"] == pytest.approx([1.5] * 4)
    assert found["b"] == pytest.approx([0.5] * 4)


def test_an_interruption_within_a_round_is_left_out() -> None:
    clock = Clock(lambda call: 50.0 if call % (2 * REPEATS) in (2, 5) else 1.0)
    assert ratios({"a": clock.step(3.0)}, clock.step(2.0), 3, clock)["a"] == pytest.approx([1.5] * 3)


def test_the_order_of_the_steps_moves_on() -> None:
    seen: list[str] = []
    clock = Clock()
    steps = {name: (lambda name=name: (seen.append(name), clock.step(1.0)())) for name in "abc"}
    ratios(steps, clock.step(1.0), 3, clock)
    assert seen[::REPEATS] == list("abcbcacab")


def test_median_and_quartiles() -> None:
    assert Ratio.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Ratio(3.0, 2.0, 4.0)
    assert Ratio.of([2.5]) == Ratio(2.5, 2.5, 2.5)


def parameters(work: Workload) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in [*work.trunk.parameters(), *work.heads.parameters()]])


@pytest.mark.parametrize("trunk", ["mlp", "conv", "transformer"])
def test_equal_weighting_takes_the_plain_step(trunk: str) -> None:
    one, other, untouched = Workload(trunk, 3), Workload(trunk, 3), Workload(trunk, 3)
    plain(one)()
    next(c for c in ours(["equal"])).make(other)()
    moved = parameters(one) - parameters(untouched)
    assert float(moved.norm()) > 0
    assert float((parameters(other) - parameters(one)).norm()) < 1e-3 * float(moved.norm())


def test_levels_are_told_apart_and_loss_weightings_appear_once() -> None:
    found = [(c.method, c.level) for c in ours(["MGDA", "famo", "famo:one look"], ["auto", "representation", "exact"])]
    assert found == [("mgda", "representation"), ("mgda", "exact"), ("famo", "values"), ("famo:one look", "values")]
    with pytest.raises(InputError, match="no variant 'two looks' of famo"):
        ours(["famo:two looks"])


def test_a_level_is_where_the_engine_took_the_gradients() -> None:
    for contender in ours(["mgda", "famo"], ["representation", "exact"]):
        step = contender.make(Workload("mlp", 2))
        step()
        assert step.balancer.observation.level == contender.level  # type: ignore[attr-defined]


def test_a_contender_that_fails_is_a_row_with_its_reason() -> None:
    def broken(_: Workload) -> Callable[[], None]:
        raise RuntimeError("no such device\nsecond line")

    group = [*ours(["mgda"], ["exact"]), Contender("other 1.0", "mgda", "exact", broken)]
    mine, theirs = measured(group, "mlp", 2, plain(Workload("mlp", 2)), 1)
    assert mine["ratio"]["median"] > 0
    assert theirs["error"] == "RuntimeError: no such device"


def test_what_cannot_be_measured_is_refused_before_anything_is() -> None:
    told: list[str] = []
    for options in ({"trunks": ("mlp", "lstm")}, {"tasks": (0,)}, {"names": ["mgdda"]}):
        with pytest.raises(InputError):
            bench_steps(**{"names": ["equal"], "progress": lambda text, *_: told.append(text), **options})
    assert told == []


def test_rows_come_one_by_one_and_are_not_measured_again() -> None:
    kept: list[int] = []
    told: list[str] = []
    options = {"tasks": (2,), "trunks": ("mlp",), "rounds": 1, "memory": False}
    first = bench_steps(["equal", "mgda"], keep=lambda r: kept.append(len(r["rows"])), **options)
    assert kept == [1, 2]
    again = bench_steps(["equal", "mgda", "rlw"], started=first, keep=lambda r: kept.append(len(r["rows"])), **options)
    assert again["rows"][:2] == first["rows"]
    assert kept == [1, 2, 3]
    # figures of other circumstances are no figures of these
    other = bench_steps(["equal"], started={**first, "rounds": 2}, keep=lambda r: told.append(r["rows"][0]), **options)
    assert told == other["rows"] != first["rows"][:1]

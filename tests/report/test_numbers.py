"""Numbers are shown with the digits their interval supports, and axes hold round values."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.report.curves import thinned
from polytask.report.markup import escape, tag
from polytask.report.numbers import bracket, decimals_for, duration, percent, plain, shortened
from polytask.report.reading import Interval, effect_of_metric, improvement
from polytask.report.strips import axis_around_zero, nice_ticks

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, st.floats(1e-6, 1e5))
def test_the_interval_keeps_two_significant_digits(mean: float, half: float) -> None:
    decimals = decimals_for(mean - half, mean + half)
    assert decimals == 0 or 10 <= round(half * 10**decimals, 6) < 100.001 or decimals == 8


@given(finite, st.integers(0, 6))
def test_a_shown_number_reads_back_as_its_rounding(value: float, decimals: int) -> None:
    shown = float(plain(value, decimals).replace(",", "").replace("\N{MINUS SIGN}", "-"))
    assert shown == pytest.approx(value, abs=0.5000001 * 10**-decimals)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "x"])
def test_what_is_no_number_is_said(missing: object) -> None:
    assert plain(missing) == percent(missing) == duration(missing) == "n/a"
    assert bracket(missing, 1.0, 2) == ""


def test_known_numbers() -> None:
    assert plain(-0.00001, 2) == "0.00"
    assert plain(1234567.0, 0) == "1,234,567"
    assert plain(2.5, 1, sign=True) == "+2.5"
    assert plain(0.0, 1, sign=True) == "0.0"
    assert [duration(s).replace("\N{NO-BREAK SPACE}", " ") for s in (0.123, 4.56, 61, 405, 7322)] == [
        "0.12 s", "4.6 s", "61 s", "6 min 45 s", "2 h 02 min",
    ]  # fmt: skip
    assert shortened("a" * 50, 20) == "a" * 13 + "…" + "a" * 6


@given(st.lists(st.tuples(finite, st.floats(0, 1e3)), min_size=1, max_size=12), st.booleans())
def test_an_axis_holds_zero_and_every_place_is_inside(found: list[tuple[float, float]], symmetric: bool) -> None:
    intervals = [Interval(m, m - h, m + h) for m, h in found]
    axis = axis_around_zero(intervals, symmetric)
    assert axis.low <= 0 <= axis.high
    places = [axis.at(x) for i in intervals for x in i if x is not None]
    assert all(3 - 1e-9 <= p <= 97 + 1e-9 for p in places)
    assert [axis.at(x) for x in sorted(i.mean for i in intervals if i.mean is not None)] == sorted(
        axis.at(i.mean) for i in intervals if i.mean is not None
    )


@given(finite, st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_inside_and_evenly_spaced(low: float, span: float, wanted: int) -> None:
    ticks = nice_ticks(low, low + span, wanted)
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)
    assert 1 <= len(ticks) <= wanted + 1
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(s == pytest.approx(steps[0], rel=1e-6) for s in steps)


@given(st.integers(1, 500), st.integers(2, 60))
def test_thinning_keeps_the_first_and_the_last(n: int, most: int) -> None:
    kept = thinned(n, most)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, n - 1)
    assert len(kept) == min(n, most)


@given(st.text())
def test_escaped_text_closes_nothing(text: str) -> None:
    shown = escape(text)
    assert not set("<>\"'") & set(shown)
    assert escape(shown) == shown  # once is enough


def test_attributes_are_escaped_and_absent_ones_left_out() -> None:
    assert tag("td", "a<b", None, class_="x", data_label='"', hidden=True, title=None) == (
        '<td class="x" data-label="&quot;" hidden>a&lt;b</td>'
    )


@given(st.booleans(), st.floats(0.1, 10), st.floats(-5, 5), st.floats(0.01, 3))
def test_turning_a_metric_over_keeps_its_effect(higher: bool, single: float, mean: float, half: float) -> None:
    def metric(sign: int, higher_is_better: bool) -> dict[str, object]:
        low, high = sorted((sign * (mean - half), sign * (mean + half)))
        difference = {"mean": sign * mean, "low": low, "high": high}
        return {"higher_is_better": higher_is_better, "single_task": {"mean": single}, "difference": difference}

    one, turned = metric(1, higher), metric(-1, not higher)
    assert effect_of_metric(one) == effect_of_metric(turned)
    assert improvement(one) == improvement(turned)

"""Dots with intervals on one line: drawn in percent of the width, so that they fit a phone and a laptop alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polytask.report.markup import Markup, join, tag
from polytask.report.numbers import plain
from polytask.report.reading import Interval


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers that is laid over the width from 3 % to 97 %."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where the value stands, in percent of the width, held within the stretch."""
        return 3 + 94 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)

    def beyond(self, value: float) -> bool:
        """Whether the value lies off the stretch."""
        return not self.low <= value <= self.high


def axis_around_zero(intervals: Iterable[Interval], symmetric: bool = False) -> Axis:
    """An axis that holds zero and the intervals; one that towers over the others is cut so that those can be read."""
    intervals = list(intervals)
    reach = sorted(max(abs(x) for x in i if x is not None) for i in intervals if i.mean is not None)
    if not reach or reach[-1] == 0:
        return Axis(-1.0, 1.0)
    limit = 1.08 * min(reach[-1], 6 * reach[len(reach) // 2] or reach[-1])
    if symmetric:
        return Axis(-limit, limit)
    ends = [max(-limit, min(limit, x)) for i in intervals for x in i if x is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.06 * (high - low)
    return Axis(low - margin, high + margin)


def axis_of_most(intervals: Iterable[Interval]) -> Axis:
    """An axis that holds zero and all intervals but the outermost tenth at each end, and of these such as reach little beyond."""
    ends = [[x for x in i if x is not None] for i in intervals]
    lows, highs = (sorted(f(e) for e in ends if e) for f in (min, max))
    few = max(1, len(lows) // 10) if len(lows) > 3 else 0
    if not lows:
        return Axis(-1.0, 1.0)
    low, high = min(0.0, lows[few]), max(0.0, highs[-1 - few])
    reach = 0.5 * (high - low)
    low, high = min(x for x in (0.0, *lows) if x >= low - reach), max(x for x in (0.0, *highs) if x <= high + reach)
    margin = 0.06 * (high - low) or 1.0
    return Axis(low - margin, high + margin)


def strip(
    lanes: Sequence[tuple[Interval, str]],
    axis: Axis,
    title: str,
    height: int = 26,
    ticks: Sequence[float] = (),
    zero: bool = True,
) -> Markup:
    """One line of the figure: a line at zero and, one above the other, each lane's dot with its interval.

    What lies off the axis has an arrow and its number.

    Args:
        lanes: (interval, class for its colour); a class holding ``hollow`` draws an open dot.
        axis: the stretch shown.
        title: what a screen reader says of it.
        height: in pixels.
        ticks: values with a faint line.
        zero: whether zero has a strong one.
    """
    origin = axis.at(0.0)
    lines = [_line(axis.at(t), axis.at(t), 0, height, "grid") for t in ticks]
    lines += [_line(origin, origin, 0, height, "zero")] if zero else []
    gap = height / (len(lanes) + 1)
    drawn = [_lane(i, style, axis, gap * (n + 1)) for n, (i, style) in enumerate(lanes)]
    return tag("svg", tag("title", title), *lines, *drawn, class_="strip", width="100%", height=height, role="img")


def _lane(shown: Interval, style: str, axis: Axis, y: float) -> Markup:
    if shown.mean is None:
        return Markup("")
    low, high = (shown.mean if x is None else x for x in (shown.low, shown.high))
    a, b = axis.at(low), axis.at(high)
    parts = [_line(a, b, y, y, f"bar {style}")] if b > a else []
    for x, end, side in ((a, low, -1), (b, high, 1)):
        if axis.beyond(end) and (end > 0) == (side > 0):
            parts += [_arrow(x, y, side, style), _number(shown, end, x, side, axis, y - 6 if b > a else y + 3.5)]
        elif shown.known and not axis.beyond(end):
            parts.append(_line(x, x, y - 4, y + 4, f"bar {style}"))
    if not axis.beyond(shown.mean):
        parts.append(tag("circle", cx=f"{axis.at(shown.mean):.2f}%", cy=y, r=4.5, class_=f"dot {style}"))
    return join(*parts)


def _number(shown: Interval, end: float, x: float, side: int, axis: Axis, y: float) -> Markup:
    """What an arrow stands for: the value where it lies off the axis itself, else the interval's end."""
    value = shown.mean or 0.0
    off = axis.beyond(value) and (value > 0) == (side > 0)
    said = plain(value if off else end, _decimals(ticks_of(axis)) + 1, sign=True)
    anchor = "end" if side > 0 else "start"
    return tag("text", said, x=f"{x:.2f}%", y=y, dx=-8 * side, text_anchor=anchor, class_="off")


def _line(x1: float, x2: float, y1: float, y2: float, style: str) -> Markup:
    return tag("line", x1=f"{x1:.2f}%", x2=f"{x2:.2f}%", y1=y1, y2=y2, class_=style)


def _arrow(x: float, y: float, side: int, style: str) -> Markup:
    # a nested svg carries the percentage, within it the arrow head is in pixels
    head = tag("path", d=f"M{-4 * side} -4L{2 * side} 0L{-4 * side} 4", class_=f"bar {style}", fill="none")
    return tag("svg", head, x=f"{x:.2f}%", y=y, overflow="visible")


def ticks_of(axis: Axis, wanted: int = 5) -> list[float]:
    """Round values along the axis, zero among them."""
    return nice_ticks(axis.low, axis.high, wanted)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the stretch, about as many as wanted."""
    rough = (high - low) / max(1, wanted)
    if not rough > 0:
        return [low]
    power = 10.0 ** _floor_log10(rough)
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = -int(-low // step)
    ticks = [k * step for k in range(first, int(high // step) + 1)]
    return ticks or nice_ticks(low, high, 2 * wanted)


def _floor_log10(x: float) -> int:
    return math.floor(math.log10(x))


def _decimals(ticks: Sequence[float]) -> int:
    return max(0, -_floor_log10(ticks[1] - ticks[0] if len(ticks) > 1 else 1.0))


def axis_labels(axis: Axis, unit: str, wanted: int = 5) -> Markup:
    """The numbers above or under a column of strips."""
    ticks = ticks_of(axis, wanted)
    return labels([(t, f"{plain(t, _decimals(ticks), sign=bool(t))}{unit}") for t in ticks], axis)


def labels(said: Iterable[tuple[float, str]], axis: Axis) -> Markup:
    """Words at values of the axis."""
    drawn = [tag("text", words, x=f"{axis.at(t):.2f}%", y=13, text_anchor="middle") for t, words in said]
    return tag("svg", *drawn, class_="strip axis", width="100%", height=18, aria_hidden="true")

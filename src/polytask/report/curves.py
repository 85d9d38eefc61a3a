"""Lines over epochs: small charts with a band over seeds; the page's script adds a reading line under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any

from polytask.report.markup import Markup, join, tag
from polytask.report.numbers import finite, plain, shortened
from polytask.report.strips import nice_ticks

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
MOST_POINTS = 60
Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart: its mean over seeds and, where there are several, the lowest and highest seed."""

    name: str
    style: str
    mean: Values
    low: Values = ()
    high: Values = ()

    @property
    def known(self) -> bool:
        """Whether there is a point to draw."""
        return any(v is not None for v in self.mean)


def over_seeds(name: str, style: str, runs: Sequence[Sequence[Any] | None]) -> Line:
    """Join the seeds of one curve; an epoch that only some seeds reached has the mean and band of those."""
    epochs = [[x for x in map(finite, values) if x is not None] for values in zip_longest(*(r or () for r in runs))]
    while epochs and not epochs[-1]:  # a task that was learnt alone may have stopped before the others
        epochs.pop()
    mean = [fmean(v) if v else None for v in epochs]
    if len([r for r in runs if r]) < 2:
        return Line(name, style, mean)
    return Line(name, style, mean, [min(v) if v else None for v in epochs], [max(v) if v else None for v in epochs])


def chart(
    lines: Sequence[Line],
    epochs: Sequence[Any],
    title: str,
    description: str,
    *,
    unit: str = "",
    floor: float | None = None,
) -> Markup:
    """A chart of lines over epochs.

    Args:
        lines: those without a point are left out.
        epochs: what stands on the horizontal axis, one an entry of the lines.
        title: shown over the chart and read by screen readers.
        description: a sentence for those who do not see it.
        unit: put behind the numbers of the vertical axis.
        floor: the lowest value of the vertical axis, where it has one.
    """
    lines = [line for line in lines if line.known]
    if not lines:
        return tag("p", f"{title}: no values were recorded.", class_="nothing")
    longest = max(len(line.mean) for line in lines)
    xs = [float(e) for e in (epochs[:longest] if len(epochs) >= longest else range(1, longest + 1))]
    kept = thinned(longest)
    frame = _Frame(xs[0], xs[-1], *_extent(lines, floor))
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        _grid(frame, unit),
        *(_band(frame, line, xs, kept) for line in lines if line.low),
        *(_path(frame, line, xs, kept) for line in lines),
        tag("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="chart",
        role="img",
        data_chart=_readout(lines, xs, kept, unit),
    )


def _readout(lines: Sequence[Line], xs: Sequence[float], kept: Sequence[int], unit: str) -> str:
    values = [{"name": line.name, "y": [_brief(line.mean, i) for i in kept]} for line in lines]
    data = {"x": [xs[i] for i in kept], "left": LEFT, "right": WIDTH - RIGHT, "unit": unit, "lines": values}
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def legend(lines: Sequence[tuple[str, str]], limit: int = 40) -> Markup:
    """The names of the lines beside a stroke of each: (name, class)."""
    return tag("ul", *(_legend_item(name, style, limit) for name, style in lines), class_="legend")


def _legend_item(name: str, style: str, limit: int) -> Markup:
    stroke = tag("line", x1=1, x2=25, y1=5, y2=5, class_=f"line {style}")
    drawn = tag("svg", stroke, width=26, height=10, aria_hidden="true")
    return tag("li", drawn, shortened(name, limit), title=name if len(name) > limit else None)


def thinned(n: int, most: int = MOST_POINTS) -> list[int]:
    """At most ``most`` of the indices 0..n-1, evenly spaced, the last one always among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def series(history: Mapping[str, Any], *keys: str) -> Sequence[Any] | None:
    """One list out of a history, None where it is absent."""
    found: Any = history
    for key in keys:
        found = (found or {}).get(key)
    return list(found) if found else None


@dataclass(frozen=True)
class _Frame:
    """The mapping from values to the drawing's units."""

    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        span = self.last - self.first
        return (LEFT + WIDTH - RIGHT) / 2 if span == 0 else LEFT + (WIDTH - LEFT - RIGHT) * (value - self.first) / span

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)


def _extent(lines: Sequence[Line], floor: float | None) -> tuple[float, float]:
    values = [v for line in lines for part in (line.mean, line.low, line.high) for v in part if v is not None]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - margin if floor is None else min(floor, low)), high + margin


def _grid(frame: _Frame, unit: str) -> Markup:
    ticks = nice_ticks(frame.low, frame.high, 4)
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    levels = [(t, frame.y(t)) for t in ticks]
    epochs = [t for t in nice_ticks(frame.first, frame.last, 5) if t == int(t)]
    return join(
        *(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid") for _, y in levels),
        *(tag("text", _tick(t, decimals) + unit, x=LEFT - 6, y=y + 3.5, text_anchor="end") for t, y in levels),
        *(tag("text", int(t), x=frame.x(t), y=HEIGHT - 10, text_anchor="middle") for t in epochs),
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="frame"),
    )


def _tick(value: float, decimals: int) -> str:
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:g}{letter}"
    return plain(value, decimals)


def _band(frame: _Frame, line: Line, xs: Sequence[float], kept: Sequence[int]) -> Markup:
    found = [(xs[i], line.low[i], line.high[i]) for i in kept if i < len(line.low)]
    ends = [(frame.x(x), frame.y(high), frame.y(low)) for x, low, high in found if low is not None and high is not None]
    if len(ends) < 2:
        return Markup("")
    outline = [f"{x:.1f},{top:.1f}" for x, top, _ in ends] + [
        f"{x:.1f},{bottom:.1f}" for x, _, bottom in reversed(ends)
    ]
    return tag("polygon", points=" ".join(outline), class_=f"band {line.style}")


def _path(frame: _Frame, line: Line, xs: Sequence[float], kept: Sequence[int]) -> Markup:
    steps, pen, points = [], "M", 0
    for i in kept:
        value = line.mean[i] if i < len(line.mean) else None
        if value is None:
            pen = "M"
            continue
        steps.append(f"{pen}{frame.x(xs[i]):.1f} {frame.y(value):.1f}")
        pen, points = "L", points + 1
    if points == 1:
        x, y = steps[0][1:].split()
        return tag("circle", cx=x, cy=y, r=3.5, class_=f"dot {line.style}")
    return tag("path", d="".join(steps), class_=f"line {line.style}", fill="none")


def _brief(values: Values, i: int) -> float | None:
    value = values[i] if i < len(values) else None
    return None if value is None else float(f"{value:.4g}")

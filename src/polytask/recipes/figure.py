"""Figures of recipes: standalone SVG, drawn here so that no plotting library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polytask.recipes.results import Arm, Measure, Results, interval
from polytask.report.markup import Markup, join, tag
from polytask.report.numbers import plain
from polytask.report.strips import nice_ticks

Curves = npt.NDArray[np.float64]

WIDTH, LEFT, RIGHT, HEAD, FOOT, ROW, LEGEND = 720, 220, 30, 26, 30, 22, 240
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3", "#ccb974", "#64b5cd")
METHOD = "#c44e52"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-size:15px;font-weight:600}.head{font-weight:600}"
    ".tick{font-size:11px;fill:#555}.grid{stroke:#e6e6e6}"
)
MOST_POINTS = 240


class _Scale:
    """Numbers laid over a stretch of the drawing."""

    def __init__(self, values: npt.ArrayLike, start: float, end: float) -> None:
        v = np.asarray(values, dtype=np.float64)
        low, high = float(v.min()), float(v.max())
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int) -> list[tuple[float, str]]:
        """Where the round numbers lie, and how they are written."""
        found = nice_ticks(self.low, self.high, wanted)
        step = found[1] - found[0] if len(found) > 1 else 1.0
        decimals = max(0, -int(np.floor(np.log10(step) + 1e-9)))
        return [(self(t), plain(t, decimals)) for t in found]


def dots(results: Results, arms: Sequence[Arm], title: str) -> str:
    """One panel a measure: every seed a dot, the mean a stroke with its 95 % interval, the method's arms in red."""
    height = HEAD + ROW * len(arms) + FOOT
    panels = [
        tag("g", _panel(results, arms, m), transform=f"translate(0 {36 + i * (height + 8)})")
        for i, m in enumerate(results.measures.values())
    ]
    return _page(title, 40 + len(panels) * (height + 8), panels)


def _panel(results: Results, arms: Sequence[Arm], measure: Measure) -> Markup:
    spread = {arm.name: results.values(arm.name, measure.name) for arm in arms}
    bounds = {name: [x for x in interval(v) if x is not None] for name, v in spread.items()}
    scale = _Scale(np.concatenate([*spread.values(), *bounds.values()]), LEFT, WIDTH - RIGHT)
    bottom = HEAD + ROW * len(arms)
    better = {None: "", True: " (more is better)", False: " (less is better)"}[measure.higher_is_better]
    parts = [tag("text", f"{measure.text}{better}", x=16, y=16, class_="head")]
    for x, label in scale.ticks(6):
        parts.append(tag("line", x1=x, x2=x, y1=HEAD, y2=bottom, class_="grid"))
        parts.append(tag("text", label, x=x, y=bottom + 15, text_anchor="middle", class_="tick"))
    for i, arm in enumerate(arms):
        parts.append(_lane(arm, spread[arm.name], bounds[arm.name], scale, HEAD + ROW * (i + 0.5)))
    return join(*parts)


def _lane(arm: Arm, values: Curves, bounds: Sequence[float], scale: _Scale, y: float) -> Markup:
    colour = METHOD if arm.role == "method" else "#444"
    mean = scale(float(values.mean()))
    parts = [tag("text", arm.label, x=LEFT - 12, y=y + 4, text_anchor="end", style=f"fill:{colour}")]
    if bounds:
        parts.append(tag("line", x1=scale(bounds[0]), x2=scale(bounds[1]), y1=y, y2=y, stroke=colour, stroke_width=2))
    parts.append(tag("line", x1=mean, x2=mean, y1=y - 7, y2=y + 7, stroke=colour, stroke_width=3))
    parts += [tag("circle", cx=scale(v), cy=y, r=3.5, fill=colour, fill_opacity=0.5) for v in values.tolist()]
    return join(*parts)


def lines(curves: Mapping[str, Curves], title: str, x: str, y: str) -> str:
    """Curves over steps, the mean over seeds with the band from the lowest seed to the highest.

    Args:
        curves: {label: values}, each of shape (seeds, steps).
        title: over the figure.
        x: what the steps are.
        y: what the values are, with the unit.
    """
    height, top = 330, 70
    steps = max(c.shape[1] for c in curves.values())
    across = _Scale([0, steps - 1], 64, WIDTH - LEGEND)
    up = _Scale(np.concatenate([c.ravel() for c in curves.values()]), height - 44, top)
    parts = [
        tag("text", y, x=16, y=54, class_="head"),
        tag("text", x, x=(64 + WIDTH - LEGEND) / 2, y=height - 8, text_anchor="middle", class_="tick"),
    ]
    for at, label in up.ticks(5):
        parts.append(tag("line", x1=64, x2=WIDTH - LEGEND, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", label, x=58, y=at + 4, text_anchor="end", class_="tick"))
    parts += [
        tag("text", label, x=at, y=height - 26, text_anchor="middle", class_="tick") for at, label in across.ticks(6)
    ]
    for i, (label, values) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(_curve(values, across, up, colour))
        parts.append(
            tag(
                "line",
                x1=WIDTH - LEGEND + 14,
                x2=WIDTH - LEGEND + 36,
                y1=top + 20 * i,
                y2=top + 20 * i,
                stroke=colour,
                stroke_width=3,
            )
        )
        parts.append(tag("text", label, x=WIDTH - LEGEND + 42, y=top + 20 * i + 4))
    return _page(title, height, parts)


def _curve(values: Curves, across: _Scale, up: _Scale, colour: str) -> Markup:
    kept = np.unique(np.linspace(0, values.shape[1] - 1, min(MOST_POINTS, values.shape[1])).round().astype(int))
    mean, low, high = values.mean(0), values.min(0), values.max(0)

    def path(indices: npt.NDArray[np.intp], heights: Curves) -> list[str]:
        return [f"{across(float(i)):.1f},{up(float(heights[i])):.1f}" for i in indices]

    band = " ".join([*path(kept, high), *path(kept[::-1], low)])
    return join(
        tag("polygon", points=band, fill=colour, fill_opacity=0.15),
        tag("polyline", points=" ".join(path(kept, mean)), stroke=colour, stroke_width=2, fill="none"),
    )


def _page(title: str, height: float, parts: Sequence[Markup]) -> str:
    back = tag("rect", width="100%", height="100%", fill="white")
    heading = tag("text", title, x=16, y=24, class_="title")
    body = tag(
        "svg", tag("title", title), tag("style", Markup(STYLE)), back, heading, *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=WIDTH, height=height, role="img",
    )  # fmt: skip
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'

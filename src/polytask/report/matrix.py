"""A square table of numbers between -1 and 1 as coloured cells: who agrees with whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polytask.report.markup import Markup, join, tag
from polytask.report.numbers import plain, shortened

CELL, LABEL, TOP = 46, 150, 30


def matrix_map(
    names: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    limit: float,
    *,
    title: str,
    described: str,
    meaning: Callable[[int, int], str],
) -> Markup:
    """The cells with their numbers; blue above zero, orange below, the stronger the nearer to the limit.

    Args:
        names: of rows and columns.
        cells: the numbers; None where one is unknown.
        limit: the magnitude that gets the full colour.
        title: what it shows, for a screen reader.
        described: where else the numbers stand.
        meaning: what the cell in row i and column j says when pointed at.
    """
    K = len(names)
    width, height = LABEL + K * CELL + 4, TOP + K * CELL + 4
    labels = [_label(name, i) for i, name in enumerate(names)]
    drawn = [_cell(i, j, cells[i][j], limit, meaning(i, j)) for i in range(K) for j in range(K)]
    return tag(
        "svg",
        tag("title", title),
        tag("desc", described),
        *labels,
        *drawn,
        viewBox=f"0 0 {width} {height}",
        style=f"max-width:{round(width * 1.15)}px;min-width:{round(width * 0.75)}px",
        class_="map",
        role="img",
    )


def _label(name: str, i: int) -> Markup:
    middle = (i + 0.5) * CELL
    row = tag(
        "text",
        tag("title", name),
        f"{shortened(name, 17)}  {i + 1}",
        x=LABEL - 8,
        y=TOP + middle + 4,
        text_anchor="end",
    )
    return join(row, tag("text", tag("title", name), i + 1, x=LABEL + middle, y=TOP - 10, text_anchor="middle"))


def _cell(i: int, j: int, value: float | None, limit: float, meaning: str) -> Markup:
    x, y = LABEL + j * CELL, TOP + i * CELL
    shade = {"class_": style_of(value), "fill_opacity": opacity_of(value, limit)}
    return tag(
        "g",
        tag("title", meaning),
        tag("rect", x=x + 1, y=y + 1, width=CELL - 2, height=CELL - 2, rx=4, **shade),
        tag(
            "text", "–" if value is None else plain(value, 2), x=x + CELL / 2, y=y + CELL / 2 + 4, text_anchor="middle"
        ),
        data_cell=f"{i},{j}",
        class_="diagonal" if i == j else None,
    )


def style_of(value: float | None) -> str:
    """The class that colours a cell."""
    return "unknown" if value is None else "agree" if value >= 0 else "oppose"


def opacity_of(value: float | None, limit: float) -> str:
    """How strong the colour is."""
    return "0.15" if value is None else f"{min(1.0, abs(value) / limit):.2f}"


def colour_scale(limit: float) -> Markup:
    """What the colours mean."""
    steps = [limit * s / 5 for s in range(-5, 6)]
    shades = [
        tag("rect", x=n * 20, y=0, width=20, height=12, class_=style_of(s), fill_opacity=opacity_of(s, limit))
        for n, s in enumerate(steps)
    ]
    marks = (
        (0, "start", f"{plain(-limit, 2)} opposed"),
        (110, "middle", "0"),
        (220, "end", f"aligned {plain(limit, 2, sign=True)}"),
    )
    texts = [tag("text", t, x=x, y=28, text_anchor=anchor) for x, anchor, t in marks]
    return tag(
        "svg",
        tag("title", "Colour scale of the cosines"),
        *shades,
        *texts,
        viewBox="0 0 220 34",
        class_="scale",
        role="img",
    )

"""A diagnosis for people: a table of text and a heat-map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CELL, LABEL, TOP = 46, 130, 26
ALIGNED, OPPOSED = "#2b6cb0", "#dd6b20"


def table(names: Sequence[str], cells: Array, columns: Sequence[tuple[str, Array]]) -> str:
    """Cosines, numbered tasks across, and further columns with a number a task.

    Args:
        names: K tasks.
        cells: shape (K, K).
        columns: (title of at most 13 letters, shape (K,)).
    """
    K = len(names)
    room = min(24, max(map(len, names)))
    head = f"{'':{room + 4}}" + "".join(f"{i + 1:>7}" for i in range(K)) + "".join(f"{t:>14}" for t, _ in columns)
    lines = [head]
    for i, name in enumerate(names):
        shown = name if len(name) <= room else name[: room - 1] + "…"
        numbers = "".join(f"{_plain(v, '.2f'):>7}" for v in cells[i])
        lines.append(f"{i + 1:>3} {shown:{room}}{numbers}" + "".join(f"{_plain(v[i], '.3g'):>14}" for _, v in columns))
    return "\n".join(lines)


def heat_map(names: Sequence[str], cells: Array, title: str) -> str:
    """The cosines as coloured cells, an SVG: blue where gradients agree, orange where they are opposed.

    Args:
        names: K tasks.
        cells: shape (K, K), between -1 and 1; NaN where unknown.
        title: what it shows.
    """
    K = len(names)
    between = np.abs(cells[~np.eye(K, dtype=bool)])
    limit = max(0.1, float(np.nanmax(between))) if np.isfinite(between).any() else 1.0
    drawn = [f"<title>{escape(title)}</title>"]
    for i, name in enumerate(names):
        middle, shown = (i + 0.5) * CELL, escape(name if len(name) <= 16 else name[:15] + "…")
        drawn.append(f'<text x="{LABEL - 8}" y="{TOP + middle + 4}" text-anchor="end">{shown} {i + 1}</text>')
        drawn.append(f'<text x="{LABEL + middle}" y="{TOP - 8}" text-anchor="middle">{i + 1}</text>')
        drawn.extend(_cell(i, j, float(cells[i, j]), limit) for j in range(K))
    width, height = LABEL + K * CELL + 4, TOP + K * CELL + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'font-family="sans-serif" font-size="13">{"".join(drawn)}</svg>'
    )


def _cell(i: int, j: int, value: float, limit: float) -> str:
    x, y = LABEL + j * CELL, TOP + i * CELL
    known = math.isfinite(value)
    colour = "#888888" if not known else ALIGNED if value >= 0 else OPPOSED
    strength = min(1.0, abs(value) / limit) if known else 0.15
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="4" fill="{colour}" fill-opacity="{strength:.2f}"/>'
        f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" text-anchor="middle">{_plain(value, ".2f")}</text>'
    )


def _plain(value: float, form: str) -> str:
    return format(value, form).replace("-", "−") if math.isfinite(value) else "–"

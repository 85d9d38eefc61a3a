"""How fast validation losses fall: the last few of each task, and the straight line through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.balancing.base import Matrix, Vector


def start(n: int, window: int) -> dict[str, Matrix]:
    """The state before the first value: values and the numbers of their steps, shape (n, window) each, NaN where there are none yet."""
    return {key: np.full((n, window), np.nan) for key in ("history", "times")}


def record(state: dict[str, Any], at: npt.NDArray[np.intp], values: Vector, time: float) -> None:
    """Add a value for each of the rows ``at``, in place of its oldest one."""
    for key, new in (("history", values), ("times", np.full(len(at), float(time)))):
        rows = state[key][at]
        state[key][at] = np.concatenate([rows[:, 1:], new[:, None]], 1)


def slopes(state: dict[str, Any], at: npt.NDArray[np.intp]) -> Vector:
    """The least-squares slope of value against step for each of the rows ``at``; 0 where there are fewer than two values."""
    y, t = state["history"][at], state["times"][at]
    known = ~np.isnan(y)
    n = np.maximum(known.sum(1), 1)
    t, y = np.where(known, t, 0.0), np.where(known, y, 0.0)
    t, y = (np.where(known, v - (v.sum(1) / n)[:, None], 0.0) for v in (t, y))
    square = (t * t).sum(1)
    return np.asarray((t * y).sum(1) / np.where(square > 0, square, 1.0))


def softmax(v: Vector) -> Vector:
    """Exponentials that sum to 1."""
    e = np.exp(v - v.max())
    return np.asarray(e / e.sum())


def shares(v: Vector) -> Vector:
    """Values in units of their mean size; zeros where all are zero."""
    size = np.abs(v).mean()
    return np.asarray(v / size if size > 0 else np.zeros_like(v))

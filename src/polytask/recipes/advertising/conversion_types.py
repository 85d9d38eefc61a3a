"""Which conversion types are rare, from clicks and conversions before the training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError


@dataclass(frozen=True)
class History:
    """What was counted of one conversion type in the window before the training data."""

    clicks: int
    conversions: int
    parent: str | None = None


def rates(history: Mapping[str, History], a: float = 1.0, b: float = 99.0) -> dict[str, float]:
    """The smoothed rate :math:`(k + a) / (n + a + b)` of every type."""
    return {c: (h.conversions + a) / (h.clicks + a + b) for c, h in history.items()}


def rare_types(
    history: Mapping[str, History],
    *,
    tau: float = 0.01,
    least_clicks: int = 1000,
    before: Mapping[str, bool] | None = None,
    a: float = 1.0,
    b: float = 99.0,
) -> dict[str, bool]:
    r"""{type: whether it is rare}: rate below :math:`\tau`.

    A type with fewer clicks than ``least_clicks`` gets the class of its parent category (all of the parent's clicks taken together), or is
    rare where it has no parent with enough of them.

    Args:
        history: counts of the window, which ends before the training data begin.
        tau: :math:`\tau`, the rate that separates the classes.
        least_clicks: that a type needs to be judged by its own rate.
        before: the classes of the last training run; a type changes its class only beyond :math:`0.8 \tau` or :math:`1.2 \tau`.
        a: prior conversions.
        b: prior clicks without one.

    Raises:
        InputError: more conversions than clicks.
    """
    for name, h in history.items():
        if not 0 <= h.conversions <= h.clicks:
            raise InputError(f"the conversion type {name!r} has {h.conversions} conversions of {h.clicks} clicks")
    rate = rates(history, a, b)
    parents: dict[str, History] = {}
    for h in history.values():
        if h.parent is not None:
            so_far = parents.get(h.parent, History(0, 0))
            parents[h.parent] = History(so_far.clicks + h.clicks, so_far.conversions + h.conversions)
    parent_rate = rates({c: h for c, h in parents.items() if h.clicks >= least_clicks}, a, b)
    found = {}
    for name, h in history.items():
        own = rate[name] if h.clicks >= least_clicks else parent_rate.get(h.parent or "", 0.0)
        bound = tau if before is None or name not in before else tau * (1.2 if before[name] else 0.8)
        found[name] = own < bound
    return found


def undo_down_sampling(p: npt.NDArray[np.float64], kept: float) -> npt.NDArray[np.float64]:
    """The probability before a share ``kept`` of the negatives was taken: :math:`p / (p + (1 - p) / s)`."""
    return np.asarray(p / (p + (1 - p) / kept))

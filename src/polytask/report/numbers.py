"""Numbers as people read them: as many digits as their interval supports, one word for what is missing."""

from __future__ import annotations

import math
from typing import Any

MISSING = "n/a"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number or infinite."""
    if value is None or isinstance(value, str | bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def decimals_for(low: float | None, high: float | None, mean: float | None = None) -> int:
    """How many decimals show two significant digits of the interval's half width, or three of the mean without an interval."""
    width = (high - low) / 2 if low is not None and high is not None else 0.0
    if width > 0:
        return min(8, max(0, 1 - math.floor(math.log10(width))))
    if mean:
        return min(8, max(0, 2 - math.floor(math.log10(abs(mean)))))
    return 3


def plain(value: Any, decimals: int | None = None, sign: bool = False) -> str:
    """The number with thousands separated and a true minus sign; scientific where it is too large to be read otherwise.

    Args:
        value: anything; what is not a finite number reads as missing.
        decimals: how many; what four significant digits need when omitted.
        sign: write a plus before positive numbers.
    """
    x = finite(value)
    if x is None:
        return MISSING
    if decimals is None:
        decimals = 0 if x == 0 else min(8, max(0, 3 - math.floor(math.log10(abs(x)))))
    rounded = round(x, decimals) + 0.0  # adding zero turns -0.0 into 0.0
    plus = "+" if sign and rounded else ""
    text = format(rounded, f"{plus}.3e") if abs(x) >= 1e7 else format(rounded, f"{plus},.{decimals}f")
    return text.replace("-", MINUS)


def percent(value: Any, decimals: int = 1, sign: bool = True) -> str:
    """A number that is already in percent."""
    x = finite(value)
    return MISSING if x is None else f"{plain(x, decimals, sign)}{SPACE}%"


def share(value: Any) -> str:
    """A share between 0 and 1 as percent."""
    x = finite(value)
    return MISSING if x is None else percent(100 * x, 0, sign=False)


def bracket(low: Any, high: Any, decimals: int, sign: bool = False) -> str:
    """An interval, or an empty string where there is none."""
    if finite(low) is None or finite(high) is None:
        return ""
    return f"[{plain(low, decimals, sign)}, {plain(high, decimals, sign)}]"


def duration(value: Any) -> str:
    """Seconds as people say them."""
    s = finite(value)
    if s is None:
        return MISSING
    if s < 120:
        return f"{s:.2g}{SPACE}s" if s < 1 else f"{s:.1f}{SPACE}s" if s < 10 else f"{s:.0f}{SPACE}s"
    minutes, seconds = divmod(round(s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def shortened(text: object, limit: int) -> str:
    """The text on one line, its middle replaced by an ellipsis where it is longer than the limit."""
    one_line = " ".join(str(text).split())
    if len(one_line) <= limit:
        return one_line
    tail = limit // 3
    return f"{one_line[: limit - tail - 1]}…{one_line[-tail:]}"

"""What a piece of work costs: seconds by the clock, and memory above what the process held before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Filled when the work is done.

    Attributes:
        seconds: by the clock.
        peak_bytes: the highest resident memory above that at the start; None where the system does not tell (it does on Linux).
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Measure what happens within."""
    cost = Cost()
    before = _resident("VmRSS") if _forget_peak() else None
    started = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - started
    peak = _resident("VmHWM") if before is not None else None
    if before is not None and peak is not None:
        cost.peak_bytes = max(0, peak - before)


def _forget_peak() -> bool:
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def _resident(what: str) -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        line = next(row for row in STATUS.read_text().splitlines() if row.startswith(what))
        return 1024 * int(line.split()[1])
    return None

"""What a person watches while a study runs: the runs that have finished, what is being done, the time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from polytask.commands.console import err

RECENT = 8


class StudyView:
    """The last finished trainings as a table, over one line of progress."""

    def __init__(self) -> None:
        self.recent: deque[tuple[str, float]] = deque(maxlen=RECENT)
        self.state: Any = None

    def tell(self, state: Any) -> None:
        """Take in the state of a study (:class:`~polytask.training.jobs.StudyProgress`)."""
        if state.job:
            self.recent.append((state.job, state.seconds))
        self.state = state

    def __rich__(self) -> RenderableType:
        if self.state is None:
            return Text("reading the table ...")
        runs = Table(box=None, pad_edge=False, header_style="bold")
        runs.add_column("finished training", width=60, no_wrap=True, overflow="ellipsis")
        runs.add_column("after", justify="right", width=10)
        for job, seconds in self.recent:
            runs.add_row(Text(job), clock(seconds))
        line = Table.grid(padding=(0, 1))
        left = time_left(self.state)
        line.add_row(
            ProgressBar(total=max(self.state.total, 1), completed=self.state.done, width=30),
            f"{self.state.done}/{self.state.total}",
            f"{clock(self.state.seconds)} gone",
            "" if left is None else f"about {clock(left)} left",
        )
        return Group(runs, Text(self.state.stage, style="bold"), line)


def time_left(state: Any) -> float | None:
    """Seconds left were all trainings to come as long as those done, None before the first has finished."""
    return None if not state.done else state.seconds / state.done * (state.total - state.done)


def clock(seconds: float) -> str:
    """``m:ss``, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def watched(quiet: bool) -> Iterator[StudyView]:
    """A view of a study, drawn on stderr while it runs unless nobody watches: no terminal, or ``quiet``."""
    view, console = StudyView(), err()
    if quiet or not console.is_terminal:
        yield view
        return
    with Live(view, console=console, refresh_per_second=4, transient=True):
        yield view

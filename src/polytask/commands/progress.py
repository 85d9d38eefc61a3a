"""What a person watches while a study runs: the runs that have finished, what is being done, the time left."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from polytask.commands.console import err, table

RECENT = 8
JOB = re.compile(r"(?P<method>.+?)_(?P<tasks>\d+(?:-\d+)*)(?:_(?P<options>.+))?_seed-(?P<seed>\d+)")


class StudyView:
    """The last finished trainings as a table, over one line of progress.

    Args:
        targets: names of the tasks, in order, where they are known.
        clock: seconds that go on while no training ends.
    """

    def __init__(self, targets: Sequence[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.targets, self.clock = tuple(targets), clock
        self.recent: deque[tuple[str, ...]] = deque(maxlen=RECENT)
        self.state: Any = None
        self.told = 0.0

    def tell(self, state: Any) -> None:
        """Take in the state of a study (:class:`~polytask.training.jobs.StudyProgress`)."""
        if state.job:
            self.recent.append((*read_job(state.job, self.targets), minutes(state.seconds)))
        self.state, self.told = state, self.clock()

    def __rich__(self) -> RenderableType:
        if self.state is None:
            return Text("reading the table ...")
        state, since = self.state, self.clock() - self.told
        columns: list[str | tuple[str, dict[str, Any]]] = [
            ("trained", {"no_wrap": True, "overflow": "ellipsis", "width": 44}),
            ("targets", {"no_wrap": True, "overflow": "ellipsis", "width": 30}),
            "seed",
            ("after", {"justify": "right"}),
        ]
        left = time_left(state.seconds, state.done, state.total)
        line = Table.grid(padding=(0, 2))
        line.add_row(
            ProgressBar(total=max(state.total, 1), completed=state.done, width=30),
            f"{state.done} of {state.total} trainings",
            f"{minutes(state.seconds + since)} gone",
            "" if left is None else f"about {minutes(max(left - since, 0))} left",
        )
        return Group(table(columns, [list(row) for row in self.recent]), Text(state.stage, style="bold"), line)


def read_job(name: str, targets: Sequence[str]) -> tuple[str, str, str]:
    """The name of a training in words: the method with its options, the targets, the seed."""
    found = JOB.fullmatch(name)
    if found is None:
        return name, "", ""
    numbers = [int(k) for k in found["tasks"].split("-")]
    named = [targets[k] if k < len(targets) else str(k) for k in numbers]
    method = found["method"] if len(numbers) > 1 else "single-task model"
    options = (
        (found["options"] or "")
        .replace("log_losses-True", "log losses")
        .replace("preference-", "weights ")
        .replace("-", " : ")
    )
    whole = len(numbers) == len(targets) > 1
    return (
        f"{method}, {options}" if options else method,
        f"all {len(numbers)}" if whole else ", ".join(named),
        found["seed"],
    )


def time_left(seconds: float, done: int, total: int) -> float | None:
    """Seconds left were all trainings to come as long as those done, None before the first has finished."""
    return seconds / done * (total - done) if done else None


def minutes(seconds: float) -> str:
    """``m:ss``, with hours where there are any."""
    whole, rest = divmod(round(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02d}:{rest:02d}" if hours else f"{whole}:{rest:02d}"


@contextmanager
def watched(quiet: bool, targets: Sequence[str] = ()) -> Iterator[StudyView]:
    """A view of a study, drawn on stderr while it runs unless nobody watches: no terminal, or ``quiet``."""
    view, console = StudyView(targets), err()
    if quiet or not console.is_terminal:
        yield view
        return
    with Live(view, console=console, refresh_per_second=4, transient=True):
        yield view

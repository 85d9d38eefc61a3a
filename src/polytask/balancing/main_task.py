"""The task that the others serve, named or numbered by the user."""

from __future__ import annotations

from collections.abc import Sequence

from polytask.balancing.base import Balancer
from polytask.errors import InputError


def check_main(balancer: Balancer, main: str | int, tasks: Sequence[str]) -> None:
    """Refuse a main task that is none of those to be bound for the first time.

    Raises:
        InputError: no such task.
    """
    if balancer.tasks is None and main not in tasks and main not in range(len(tasks)):
        raise InputError(f"the main task {main!r} of {balancer.method.name} is none of {', '.join(tasks)}")


def main_position(balancer: Balancer, main: str | int) -> int:
    """Its index among all tasks of a bound balancer."""
    assert balancer.tasks is not None
    return main if isinstance(main, int) else balancer.tasks.index(main)

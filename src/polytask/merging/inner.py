"""Methods that work around another method."""

from __future__ import annotations

from polytask.errors import InputError
from polytask.merging.base import Merger, TaskVectorMerger
from polytask.merging.in_memory import make


def inner_merger(outer: Merger, name: str, options: dict[str, object] | None) -> TaskVectorMerger:
    """The merger of task vectors that another one works around, by its name.

    Its own ``scale`` is left at 1: the outer one's counts.

    Raises:
        InputError: unknown, no merger of task vectors, or one that must see the whole model first.
    """
    if not isinstance(options or {}, dict):
        raise InputError(
            f"options of the method within {outer.method.name} are given by their names, not as {options!r}"
        )
    made = make(name, **(options or {}))
    if not isinstance(made, TaskVectorMerger):
        raise InputError(f"{outer.method.name} works around a method that merges task vectors, not {made.method.name}")
    if made.passes or made.needs == "statistics":
        raise InputError(
            f"{outer.method.name} works around methods that look at one tensor at a time, not {made.method.name}"
        )
    return made

"""Whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from polytask.errors import InputError


def turns(steps: Mapping[str, int]) -> Iterator[str]:
    """Name an objective for every optimizer step, for ever: so many steps of each, in order, over and over.

    ::

        for objective, batch in zip(turns({"forget": 1, "retain": 5}), batches):
            ...
            optimizer.step(objective=objective)

    Args:
        steps: {objective: consecutive optimizer steps in each round}. With gradient accumulation a step is an optimizer's, not a batch.

    Raises:
        InputError: a negative number, or no step at all.
    """
    if any(n < 0 for n in steps.values()) or not any(steps.values()):
        raise InputError(f"each objective takes a number of steps a round, some of them more than 0, not {dict(steps)}")
    order = [name for name, n in steps.items() for _ in range(n)]

    def rounds() -> Iterator[str]:
        while True:
            yield from order

    return rounds()

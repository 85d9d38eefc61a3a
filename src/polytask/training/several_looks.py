"""Steps of the methods that look at the model more than once: what they need of the settings, and how they get their batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polytask.balancing import Balancer
from polytask.errors import InputError
from polytask.training.config import TrainConfig
from polytask.training.data import Batch, rows_of


def check_looks(balancer: Balancer, config: TrainConfig, told: bool = False) -> None:
    """See that a method which looks more than once a step can work.

    Args:
        balancer: the method.
        config: the settings.
        told: whether the optimizer takes the losses of single tasks itself.

    Raises:
        InputError: a setting under which it cannot.
    """
    name, parts = balancer.method.name, len(balancer.roles)
    if config.accumulate > 1:
        raise InputError(f"{name} looks at the model more than once a step: give a larger batch_size, not accumulate")
    if told:
        raise InputError(f"{name} finds the gradients itself, which this optimizer does too: take another of either")
    if config.level == "representation":
        raise InputError(f"{name} takes gradients at the parameters, not at level='representation'")
    if parts > 1 and config.batch_size < 2 * parts:
        raise InputError(f"{name} cuts every batch in {parts}: batch_size must be at least {2 * parts}")


def cut(batch: Batch, parts: int) -> list[Batch]:
    """A batch in several: every parts-th row goes together, so that rows in random order make independent batches.

    Returns:
        The parts; none at all where a part would have fewer than two rows.

    Raises:
        InputError: a tensor that has not one row an example.
    """
    if parts == 1:
        return [batch]
    rows = len(rows_of(batch[1]))
    if rows < 2 * parts:
        return []
    return [(_every(batch[0], k, parts, rows), _every(batch[1], k, parts, rows)) for k in range(parts)]


def _every(value: Any, first: int, step: int, rows: int) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != rows:
            raise InputError(
                f"a batch of {rows} rows cannot be cut in {step} for this balancing method: it holds a tensor of shape {tuple(value.shape)}"
            )
        return value[first::step]
    if isinstance(value, Mapping):
        return {n: _every(v, first, step, rows) for n, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_every(v, first, step, rows) for v in value)
    return value

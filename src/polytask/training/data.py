"""Rows held in memory, and the batches a step is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from polytask.errors import InputError
from polytask.tasks import Tasks

Inputs = Any
Batch = tuple[Inputs, Mapping[str, Tensor]]


class TaskData:
    """Inputs and labels of all rows as tensors, from which batches are taken by indexing, without a loader.

    Args:
        inputs: a tensor of shape (rows, ...), or a dict of such tensors, handed to the model as it is.
        targets: {task: (rows,) or (rows, labels)}; NaN (floats) or a negative number (integers) = missing.

    Raises:
        InputError: tensors that disagree in the number of rows; the message names the first.
    """

    def __init__(self, inputs: Mapping[str, Tensor] | Tensor, targets: Mapping[str, Tensor]) -> None:
        self.inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        self.targets = dict(targets)
        named = (
            {f"the input {n!r}": t for n, t in self.inputs.items()}
            if isinstance(self.inputs, dict)
            else {"the input": self.inputs}
        )
        named |= {f"the labels of task {n!r}": t for n, t in self.targets.items()}
        if not named:
            raise InputError("there are neither inputs nor labels")
        first, tensor = next(iter(named.items()))
        self._rows = len(tensor)
        for name, other in named.items():
            if len(other) != self._rows:
                raise InputError(
                    f"{first} has {self._rows} rows, {name} {'have' if 'labels' in name else 'has'} {len(other)}"
                )

    def __len__(self) -> int:
        return self._rows

    def rows(self, index: Int[Tensor, " rows"] | slice) -> TaskData:
        """The given rows, in the given order."""
        inputs = {n: t[index] for n, t in self.inputs.items()} if isinstance(self.inputs, dict) else self.inputs[index]
        return TaskData(inputs, {n: t[index] for n, t in self.targets.items()})

    def to(self, device: torch.device | str) -> TaskData:
        """The same rows on another device."""
        return TaskData(to_device(self.inputs, device), to_device(self.targets, device))


TrainingData = TaskData | Iterable[Batch]


def to_device(value: Any, device: torch.device | str) -> Any:
    """Move every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {n: to_device(v, device) for n, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value


def epoch_order(rows: int, seed: int, epoch: int) -> Int[Tensor, " rows"]:
    """The order of the rows in an epoch: a function of seed and epoch alone, so that a restarted run finds it again."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(state))


class Batches:
    """The micro-batches of an epoch, grouped into steps.

    Args:
        data: rows in memory, or any iterable of ``(inputs, targets)`` batches, such as a DataLoader.
        batch_size: rows of a micro-batch (rows in memory only).
        accumulate: micro-batches a step; the last step of an epoch may have fewer.
        seed: of the order of rows in memory.
        share: (this process, number of processes): each takes its part of every micro-batch.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.data, self.batch_size, self.accumulate, self.seed = data, batch_size, accumulate, seed
        self.rank, self.processes = share
        if isinstance(data, TaskData) and len(data) < self.processes:
            raise InputError(
                "there is no row to train on"
                if not len(data)
                else f"{len(data)} rows do not go round {self.processes} processes"
            )

    @property
    def steps(self) -> int | None:
        """Steps an epoch, or None where the iterable does not know its length."""
        if isinstance(self.data, TaskData):
            whole, rest = divmod(len(self.data), self.batch_size * self.processes)
            pieces = whole + (rest >= self.processes)
        elif isinstance(self.data, Sized):
            pieces = len(self.data)
        else:
            return None
        return -(-pieces // self.accumulate)

    def epoch(self, epoch: int, start: int = 0, skipped: Callable[[], None] = lambda: None) -> Iterator[list[Batch]]:
        """The steps of an epoch, each a list of micro-batches.

        Args:
            epoch: counted from 0.
            start: steps to leave out.
            skipped: called when that many have been left out, where there are any.
        """
        pieces = iter(self.data) if not isinstance(self.data, TaskData) else self._rows(epoch, start)
        if start:
            if not isinstance(self.data, TaskData):
                for _ in islice(pieces, start * self.accumulate):
                    pass
            skipped()
        step: list[Batch] = []
        for piece in pieces:
            if not (isinstance(piece, list | tuple) and len(piece) == 2 and isinstance(piece[1], Mapping)):
                raise InputError(f"a batch is (inputs, {{task: labels}}), not {type(piece).__name__}")
            step.append((piece[0], piece[1]))
            if len(step) == self.accumulate:
                yield step
                step = []
        if step:
            yield step

    def _rows(self, epoch: int, start: int) -> Iterator[Batch]:
        assert isinstance(self.data, TaskData)
        order = epoch_order(len(self.data), self.seed, epoch)
        size = self.batch_size * self.processes
        for begin in range(start * self.accumulate * size, len(order), size):
            mine = order[begin : begin + size]
            if len(mine) < self.processes:  # a last batch too small to give every process a row
                return
            part = self.data.rows(mine[self.rank :: self.processes])
            yield part.inputs, part.targets


def check_targets(data: TaskData, tasks: Tasks, role: str) -> None:
    """See that every task has at least one label.

    Raises:
        InputError: a task without labels; the message names it and the data's role.
    """
    for name, task in tasks.items():
        if name not in data.targets or not bool(task.kind.labelled(data.targets[name]).any()):
            raise InputError(f"task {name!r} has no label in the {role} data")


def rows_of(value: Any) -> Shaped[Tensor, "rows *rest"]:
    """The first tensor in nested inputs, whose length is the number of rows."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value

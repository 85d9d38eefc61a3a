"""Tasks: named things to learn from the same inputs, with labels that may be missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from polytask.errors import InputError
from polytask.tasks.kinds import Kind, kind_from_json
from polytask.tasks.metric import Metric, as_metric

ExampleLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Args:
        name: unique among the tasks of a model.
        kind: what is predicted (:mod:`polytask.tasks.kinds`): how outputs are charged, read and judged.
        classes: the user's own names of the classes, in the order of their indices; empty for numbers.
        example_loss: replaces the kind's loss: ``(prediction, target) -> (labelled examples,)``, or a scalar for losses
            that cannot be split.
        judged_by: replaces the kind's metrics, the primary one first; torchmetrics objects are accepted.
    """

    name: str
    kind: Kind
    classes: tuple[Any, ...] = ()
    example_loss: ExampleLoss | None = None
    judged_by: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "judged_by", tuple(as_metric(metric) for metric in self.judged_by))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the task is judged by, the primary metric first."""
        return self.judged_by or self.kind.metrics

    def loss(
        self, prediction: Float[Tensor, "batch *outputs"], target: Shaped[Tensor, "batch *rest"]
    ) -> Float[Tensor, ""] | None:
        """Mean loss over the labelled examples, or None where none has a label.

        Raises:
            InputError: prediction and target disagree in the number of examples.
        """
        if prediction.shape[0] != target.shape[0]:
            raise InputError(
                f"task {self.name!r}: {prediction.shape[0]} predictions but {target.shape[0]} labels in the batch"
            )
        known = self.kind.labelled(target)
        n = int(known.sum())
        if n == 0:
            return None
        if n < known.numel():
            prediction, target = prediction[known], target[known]
        return (self.example_loss or self.kind.loss)(prediction, target).mean()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description; own losses and metrics are code and are not part of it."""
        return {"name": self.name, "classes": list(self.classes), **self.kind.to_json()}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Task:
        """Read back what :meth:`to_json` wrote."""
        options = dict(description)
        return cls(options.pop("name"), classes=tuple(options.pop("classes")), kind=kind_from_json(options))


class Tasks(Mapping[str, Task]):
    """An ordered collection of tasks, by name.

    Raises:
        InputError: no task, or two tasks of one name.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            if task.name in self._tasks:
                raise InputError(f"two tasks are called {task.name!r}")
            self._tasks[task.name] = task
        if not self._tasks:
            raise InputError("there is no task to learn")

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"Tasks({', '.join(f'{t.name}: {t.kind.name}' for t in self.values())})"

    def only(self, names: Iterable[str]) -> Tasks:
        """The tasks of the given names, in this collection's order."""
        wanted = set(names)
        return Tasks(t for n, t in self._tasks.items() if n in wanted)

    def losses(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The mean loss of every task that has a label in this batch.

        Args:
            outputs: raw head outputs, each (batch, output_size).
            targets: labels, each (batch,) or (batch, labels); NaN (floats), negative (integers) or an absent key = missing.

        Returns:
            Scalars with graph, in the order of the tasks; a task without any label here is **absent** from the dict.
        """
        found = {n: t.loss(outputs[n], targets[n]) for n, t in self._tasks.items() if n in targets and n in outputs}
        return {n: loss for n, loss in found.items() if loss is not None}

    @torch.no_grad()
    def decode(self, outputs: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Read the raw outputs of every task: see :meth:`Kind.decode`."""
        return {n: t.kind.decode(outputs[n].float()) for n, t in self._tasks.items() if n in outputs}

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-ready description of all tasks."""
        return [t.to_json() for t in self.values()]

    @classmethod
    def from_json(cls, descriptions: Iterable[dict[str, Any]]) -> Tasks:
        """Read back what :meth:`to_json` wrote."""
        return cls(Task.from_json(d) for d in descriptions)

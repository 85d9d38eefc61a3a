"""What a diagnosis looks at: the losses of the tasks in a batch, and the parameters they share, of any model and loader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from polytask.autograd import Losses, Shared, leaves, named_losses, partition
from polytask.errors import InputError
from polytask.models import MultiTaskModel
from polytask.tasks import Binary, Kind, Multiclass, Multilabel, Regression, Task, Tasks
from polytask.training.data import to_device

LossesOf = Callable[[Any, Any], Losses]


class Diagnosed:
    """A model whose tasks' losses are found batch by batch.

    Args:
        model: maps inputs to ``{task: output}`` or, with its labels, to ``{task: loss}``.
        tasks: what is learnt; or a function (model, batch) -> losses; None for what the model holds as ``model.tasks``, or what outputs
            and labels of the first batch tell.
    """

    def __init__(self, model: nn.Module, tasks: Tasks | LossesOf | None) -> None:
        self.model = model
        held = getattr(model, "tasks", None)
        self.tasks = tasks if isinstance(tasks, Tasks) else held if tasks is None and isinstance(held, Tasks) else None
        self._losses_of = None if isinstance(tasks, Tasks) else tasks
        parameters = list(model.parameters())
        if not parameters:
            raise InputError("the model has no parameters: there is nothing that tasks could share")
        self.device = parameters[0].device

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The loss of every task with labels in the batch, with graph."""
        batch = to_device(batch, self.device)
        if self._losses_of is not None:
            return named_losses(self._losses_of(self.model, batch))
        inputs, labels = _apart(batch)
        outputs = self._outputs(inputs)
        if not isinstance(outputs, Mapping):
            raise InputError(
                f"the model returned {type(outputs).__name__}: {{task: output}} is expected, or tasks= a function (model, batch) -> losses"
            )
        if self.tasks is None and all(
            isinstance(o, Tensor) and o.numel() == 1 and o.ndim == 0 for o in outputs.values()
        ):
            return named_losses(outputs)
        targets = _named(labels, tuple(outputs))
        if self.tasks is None:
            self.tasks = Tasks(Task(n, kind_of(n, outputs[n], targets[n])) for n in outputs if n in targets)
        return self.tasks.losses(outputs, targets)

    def _outputs(self, inputs: Any) -> Any:
        if isinstance(self.model, MultiTaskModel):
            return self.model(inputs, tasks=tuple(self.tasks or self.model.tasks))
        several = len(inspect.signature(self.model.forward).parameters) > 1
        return self.model(**inputs) if isinstance(inputs, Mapping) and several else self.model(inputs)

    def shared(self, losses: Mapping[str, Tensor], given: Shared) -> list[Tensor]:
        """The parameters called shared, or that the model declares so, or that at least two losses reach."""
        if given is None and hasattr(self.model, "shared_parameters"):
            given = cast(Any, self.model).shared_parameters()
        reached = [leaves(loss, complete=True) for loss in losses.values()]
        groups, _ = partition(list(losses), False, reached, given)
        found = [p for g in groups for p in g.parameters]
        if not found:
            raise InputError("no parameter is reached by the losses of two tasks: nothing is shared")
        return found


def _apart(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels: ``(inputs, labels)``, ``(inputs, labels of the first task, of the second, ...)``, or all in one."""
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[0], batch[1] if len(batch) == 2 else list(batch[1:])
    return batch, batch


def _named(labels: Any, names: tuple[str, ...]) -> Mapping[str, Tensor]:
    """Labels by task: by name, or in the order of the model's outputs."""
    if isinstance(labels, Mapping):
        return labels
    columns = list(labels.unbind(1)) if isinstance(labels, Tensor) and labels.ndim == 2 else labels
    if isinstance(columns, list) and len(columns) == len(names):
        return dict(zip(names, columns, strict=True))
    raise InputError(
        f"labels of the tasks {', '.join(names)} are expected in a batch, by name or one after another: "
        "or give tasks= a function (model, batch) -> losses"
    )


def kind_of(name: str, output: Tensor, target: Tensor) -> Kind:
    """What kind of task outputs and labels look like: classes, yes or no, several of these, or a number.

    Raises:
        InputError: shapes that fit none.
    """
    column = output.ndim == target.ndim or (output.ndim == target.ndim + 1 and output.shape[-1] == 1)
    known = target[~torch.isnan(target)] if target.is_floating_point() else target[target >= 0]
    yes_or_no = bool(((known == 0) | (known == 1)).all())
    if target.ndim == 1 and not target.is_floating_point() and output.ndim == 2 and output.shape[1] > 1:
        return Multiclass(output.shape[1])
    if target.ndim == 2 and target.shape == output.shape and target.shape[1] > 1 and yes_or_no:
        return Multilabel(target.shape[1])
    if target.ndim <= 2 and target.numel() == len(target) and column:
        return Binary() if yes_or_no else Regression()
    raise InputError(
        f"what kind of task {name!r} is cannot be told from outputs of shape {tuple(output.shape)} and labels of shape "
        f"{tuple(target.shape)}: give tasks=, Tasks or a function (model, batch) -> losses"
    )

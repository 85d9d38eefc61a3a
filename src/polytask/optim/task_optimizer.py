"""Optimizers that are told the losses of single tasks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from polytask.autograd import Losses, named_losses
from polytask.errors import InputError, TrainingError
from polytask.optim.combination import TaskBalancer, Weights, weights_before_gradients
from polytask.registry import find

if TYPE_CHECKING:
    from polytask.registry import Method


@dataclass(frozen=True)
class Given:
    """What a ``backward`` was given.

    Attributes:
        names: the tasks present.
        losses: what is differentiated, one scalar a task.
        values: of these, shape (tasks,), detached.
        balancer: the balancing method, where there is one.
        weights: shape (tasks,), where they follow from the losses; None where the gradients decide.
        scale: what gradients in ``.grad`` are multiplied by for float16.
    """

    names: tuple[str, ...]
    losses: list[Tensor]
    values: Tensor
    balancer: TaskBalancer | None
    weights: Tensor | None
    scale: float


class TaskOptimizer(Optimizer, ABC):
    """An optimizer whose ``backward(losses)`` takes the place of ``loss.backward()``; ``polytask.train`` calls it where it is given one.

    ::

        optimizer.zero_grad()
        optimizer.backward(losses)      # {task: scalar}
        optimizer.step()

    ``backward`` adds the gradient of the (weighted) sum of losses to ``.grad``, as ``polytask.backward`` does: gradient scalers and
    clipping by norm between the two lines work as with any optimizer, and several calls before one ``step`` accumulate.

    Attributes:
        tasks: their names, fixed by the first call of :meth:`bind` or ``backward``; batches may lack some of them.
    """

    method: ClassVar[Method]
    tasks: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def for_tasks(cls, parameters: Iterable[Tensor], tasks: Sequence[str], *, lr: float, weight_decay: float) -> Self:
        """One with default options; the weight decay is decoupled."""

    @abstractmethod
    def backward(
        self, losses: Losses, *, balancer: TaskBalancer | str | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> Float[Tensor, " tasks"]:
        """Differentiate the losses of one batch.

        Args:
            losses: {task: scalar}, or scalars, with graph. Absent tasks are left out.
            balancer: a balancing method, as far as there is something left for it to decide.
            scaler: the gradient scaler of mixed precision; the gradients then stand scaled.

        Returns:
            The weight of each task given, shape (losses,), detached.
        """

    def bind(self, tasks: Sequence[str], shared: Iterable[Tensor] | None = None) -> list[int]:  # noqa: ARG002
        """Fix the tasks (once; the first ``backward`` does it unless called before), or find the given ones among them.

        Args:
            tasks: names.
            shared: the parameters on which tasks meet, for optimizers that treat these apart from others.

        Raises:
            InputError: a task that was not among the first ones.
        """
        self.tasks = self.tasks or tuple(tasks)
        unknown = [t for t in tasks if t not in self.tasks]
        if unknown:
            raise InputError(
                f"this optimizer serves the tasks {', '.join(self.tasks)}; {', '.join(unknown)} is not one of them"
            )
        return [self.tasks.index(t) for t in tasks]

    def begin(
        self,
        losses: Losses,
        balancer: TaskBalancer | str | None,
        weights: Weights,
        scaler: torch.amp.GradScaler | None,
    ) -> Given:
        """Check the losses and find what is known before any gradient.

        Raises:
            InputError: losses that are no scalars with graph, unknown tasks, both a balancer and weights, weights that do not fit.
            TrainingError: a loss that is not finite (with an active scaler the step is skipped instead).
        """
        named = named_losses(losses)
        if balancer is not None and weights is not None:
            raise InputError("give a balancer or weights, not both")
        if isinstance(balancer, str):
            balancer = cast(TaskBalancer, find(balancer, family="balancing").factory())
        if balancer is not None and (balancer.needs == "several batches" or len(balancer.roles) > 1):
            raise InputError(
                f"{balancer.method.name} looks at several batches, and an optimizer's backward is given one"
            )
        self.bind(list(named))
        each = [loss if balancer is None else balancer.transform(loss) for loss in named.values()]
        values = torch.stack(each).detach()
        scale = float(scaler.scale(torch.ones_like(values[0]))) if scaler is not None else 1.0
        if scale == 1.0:
            require_finite("loss", list(named), values[:, None])
        known = weights_before_gradients(balancer, weights, list(named), values)
        return Given(tuple(named), each, values, balancer, known, scale)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken."""
        super().load_state_dict(cast(Any, state_dict))
        # the base class casts what it loads to the parameters' type: what was kept in another one is put back as it was
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(places, (p for group in self.param_groups for p in group["params"]), strict=True):
            if i in state_dict["state"]:
                self.state[p] = {
                    k: v.detach().clone().to(p.device) if isinstance(v, Tensor) else copy.copy(v)
                    for k, v in state_dict["state"][i].items()
                }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


def require_finite(what: str, names: Sequence[str], rows: Float[Tensor, "tasks coordinates"]) -> None:
    """Refuse what is not finite.

    Raises:
        TrainingError: naming the tasks.
    """
    finite = torch.isfinite(rows).all(1)
    if not bool(finite.all()):
        bad = ", ".join(repr(n) for n, ok in zip(names, finite.tolist(), strict=True) if not ok)
        raise TrainingError(f"the {what} of task {bad} is not finite: no gradient was touched")


def add_to_gradients(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: Tensor | float = 1.0
) -> None:
    """Add gradients, each times the weight, to ``.grad``."""
    for p, g in zip(parameters, gradients, strict=True):
        if g is not None:
            g = weight * g.detach().view_as(p)  # always new memory: what autograd returns may be the caller's own data
            p.grad = g if p.grad is None else p.grad.add_(g)


def working(dtype: torch.dtype) -> torch.dtype:
    """The type that moments are computed in: half precision is too coarse for running means."""
    return torch.promote_types(dtype, torch.float32)


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """What an optimizer's closure returns, with gradients switched on; None where none was given."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()

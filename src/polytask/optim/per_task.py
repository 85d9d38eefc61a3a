"""A state for every parameter and every task that reaches it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import Losses, leaves
from polytask.errors import InputError
from polytask.optim.combination import TaskBalancer, Weights
from polytask.optim.task_optimizer import Given, TaskOptimizer, add_to_gradients, evaluated, require_finite, working


class PerTaskOptimizer(TaskOptimizer):
    """The part that optimizers with separate states for single tasks have in common; a method writes :meth:`update`.

    Nothing needs to be declared shared: the tasks of a parameter are those whose losses reach it, and where that is one (a head) the
    method is the ordinary optimizer. A task that is absent from a step is passed over, as torch's optimizers pass over parameters without
    gradient: its state stays, and its steps are counted for itself.
    """

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.0, **defaults: Any) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise InputError(f"{self.method.name} takes as {name} a number of at least 0, not {value!r}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults})
        self._forget()

    @classmethod
    def for_tasks(cls, parameters: Iterable[Tensor], tasks: Sequence[str], *, lr: float, weight_decay: float) -> Self:
        new = cls(parameters, lr=lr, weight_decay=weight_decay)
        new.bind(tasks)
        return new

    def _forget(self) -> None:
        """Forget what was collected since the last step."""
        self._gradients: dict[Tensor, dict[str, Tensor]] = {}
        self._weights: dict[str, list[float]] = {}
        self._lengths: dict[Tensor, Tensor] = {}

    @abstractmethod
    def update(
        self, p: Tensor, gradients: Mapping[str, Tensor], weights: Mapping[str, float], group: Mapping[str, Any]
    ) -> None:
        """Move a parameter.

        Args:
            p: the parameter.
            gradients: {task: its gradient, in p's shape}.
            weights: {task: factor}; ones unless given to ``backward``.
            group: the options of p's group.
        """

    def moment(self, p: Tensor, name: str, task: str) -> Tensor:
        """A running mean of a task's gradients at a parameter, zeros at first; to be changed in place."""
        state = self.state[p]
        key = f"{name}:{task}"
        if key not in state:
            state[key] = torch.zeros_like(p, dtype=working(p.dtype))
        kept: Tensor = state[key]
        return kept

    def count(self, p: Tensor, task: str) -> int:
        """Count, and tell, the steps in which the task reached the parameter."""
        steps = self.state[p].setdefault("steps", {})
        steps[task] = steps.get(task, 0) + 1
        return int(steps[task])

    def backward(
        self,
        losses: Losses,
        *,
        balancer: TaskBalancer | str | None = None,
        weights: Weights = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Float[Tensor, " tasks"]:
        """Add the gradient of the weighted sum of losses to ``.grad`` and remember every task's own until ``step``.

        What ``step`` uses are the single tasks' gradients; where the norm of ``.grad`` was changed in between (unscaled, clipped), so
        are they.

        Args:
            losses: {task: scalar}, or scalars, with graph. Absent tasks are left out.
            balancer: a balancing method that needs the losses' values only, or the name of one without state.
            weights: the weights themselves, of at least 0, instead; ones when both are omitted.
            scaler: the gradient scaler of mixed precision; the gradients then stand scaled.

        Returns:
            The weights, shape (losses,), detached.

        Raises:
            InputError: losses, tasks or weights that do not fit, a balancer that asks for gradients.
            TrainingError: a loss or gradient that is not finite (with an active scaler its step is skipped instead).

        Cost: one backward pass a task.
        """
        given = self.begin(losses, balancer, weights, scaler)
        if given.weights is None:
            raise InputError(
                f"{self.method.name} balances the gradients itself: give it weights, or a balancer that needs losses only"
            )
        found = self._differentiate(given)
        if given.scale == 1.0:
            require_finite(
                "gradient", given.names, torch.stack([_largest(one.values(), given.values) for one in found])
            )
        for task, one, w in zip(given.names, found, given.weights.tolist(), strict=True):
            self._weights.setdefault(task, []).append(w)
            for p, g in one.items():
                kept = self._gradients.setdefault(p, {})
                g = g if given.scale == 1.0 else g / given.scale
                kept[task] = kept[task] + g if task in kept else g
            add_to_gradients(list(one), list(one.values()), w)
        reached = list(self._gradients)
        lengths = torch._foreach_norm([p.grad for p in reached if p.grad is not None]) if reached else ()
        self._lengths = {p: n / given.scale for p, n in zip(reached, lengths, strict=True)}
        return given.weights

    def _differentiate(self, given: Given) -> list[dict[Tensor, Tensor]]:
        """For each loss {parameter of ours that it reaches: gradient}, scaled."""
        ours = {id(p) for group in self.param_groups for p in group["params"]}
        found = []
        for k, loss in enumerate(given.losses):
            mine = [p for p in leaves(loss, complete=True) if id(p) in ours]
            keep = k + 1 < len(given.losses)
            rows = torch.autograd.grad(given.scale * loss, mine, retain_graph=keep, allow_unused=True) if mine else ()
            found.append({p: g for p, g in zip(mine, rows, strict=True) if g is not None})
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that a loss has reached since the last step.

        Args:
            closure: evaluated first, where given; it ends with ``backward`` of this optimizer.

        Raises:
            InputError: no task gradients were collected since the last step.
        """
        loss = evaluated(closure)
        if not self._gradients:
            raise InputError(
                f"{self.method.name} found no task gradients: call optimizer.backward(losses) in place of loss.backward()"
            )
        weights = {task: sum(some) / len(some) for task, some in self._weights.items()}
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._gradients and p.grad is not None:
                    before = self._lengths[p]
                    changed = torch.where(before > 0, p.grad.norm() / before, 1.0)
                    gradients = {t: (changed * g).to(working(p.dtype)) for t, g in self._gradients[p].items()}
                    if group["weight_decay"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    self.update(p, gradients, weights, group)
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and what was collected for the next step."""
        super().zero_grad(set_to_none)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter and the names of the tasks: tensors, numbers and strings only."""
        return {**super().state_dict(), "tasks": list(self.tasks)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: a state of another optimizer, or of other tasks.
        """
        if "tasks" not in state_dict:
            raise InputError(f"this state was not saved by {self.method.name}: it has no entry 'tasks'")
        if self.tasks and state_dict["tasks"] and self.tasks != tuple(state_dict["tasks"]):
            raise InputError(
                f"this state was saved for the tasks {', '.join(state_dict['tasks'])}, not {', '.join(self.tasks)}"
            )
        super().load_state_dict(state_dict)
        self.tasks = tuple(state_dict["tasks"]) or self.tasks
        self._forget()


def _largest(gradients: Iterable[Tensor], like: Tensor) -> Float[Tensor, "1"]:
    """The largest magnitudes of some tensors, added up: not finite if one of them is not, whatever their type."""
    norms = torch._foreach_norm([like.new_zeros(1), *(g for g in gradients if g.numel())], torch.inf)
    return torch.stack([n.to(like) for n in norms]).sum(0, keepdim=True)

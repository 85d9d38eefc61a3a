"""What a step is given, before any gradient is taken: losses checked, agreed between processes, and transformed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from polytask.autograd import Losses, Processes, named_losses
from polytask.balancing.base import Balancer
from polytask.balancing.given import refuse_negative
from polytask.balancing.observation import Observation
from polytask.errors import InputError, TrainingError

Counts = Mapping[str, float | Tensor] | None
OnNonfinite = Literal["raise", "skip-task", "skip-step"]


@dataclass
class Step:
    """The losses of one step.

    Attributes:
        names: the tasks that are present, on any process.
        scalars: with graph, one a task; the mean over processes of their gradients is that of the balanced losses.
        values: what the balancer reads, shape (tasks,), detached: the same on all processes.
        idle: scalars of tasks that no process has labels for. Their gradients are zero, but distributed wrappers wait for them.
        scale: what the gradients written are multiplied by for float16.
        scaled: whether a gradient scaler watches over them.
        on_nonfinite: ``raise``, ``skip-task`` or ``skip-step``.
        skipped: tasks left out because their loss is not finite.
        processes: those that share the batch; None for one.
        together: how many losses one backward pass of a Jacobian takes, or how that is found.
    """

    names: list[str]
    scalars: list[Tensor]
    values: Tensor
    idle: list[Tensor] = field(default_factory=list)
    scale: float = 1.0
    scaled: bool = False
    on_nonfinite: OnNonfinite = "raise"
    skipped: tuple[str, ...] = ()
    processes: Processes | None = None
    together: int | Literal["auto", "probe"] = "auto"

    @property
    def total(self) -> Tensor:
        """The sum of all scalars, times the scale."""
        total = torch.stack([*self.scalars, *self.idle]).sum()
        return total * self.scale if self.scale != 1.0 else total

    @property
    def scaled_losses(self) -> list[Tensor]:
        """The scalars times the scale."""
        return [s * self.scale for s in self.scalars] if self.scale != 1.0 else self.scalars

    def some(self, names: Sequence[str]) -> Step:
        """The step of some of its tasks."""
        at = [self.names.index(n) for n in names]
        return Step(
            list(names),
            [self.scalars[i] for i in at],
            self.values if len(at) == len(self.names) else self.values[at],
            self.idle,
            self.scale,
            self.scaled,
            self.on_nonfinite,
            self.skipped,
            self.processes,
            self.together,
        )

    def not_taken(self, level: str, skipped: Sequence[str]) -> Observation:
        """What is reported where ``.grad`` stays as it was."""
        return Observation(tuple(self.names), self.values, None, None, level, (*self.skipped, *skipped), taken=False)


def begin(
    balancer: Balancer,
    losses: Losses,
    counts: Counts,
    on_nonfinite: OnNonfinite,
    processes: Processes | None,
) -> Step:
    """Bind the balancer to the tasks present and find what it will read.

    Raises:
        InputError: losses, counts or ``on_nonfinite`` that make no sense, or that differ between processes.
        TrainingError: a loss that is not finite, with ``on_nonfinite="raise"``.
    """
    if on_nonfinite not in ("raise", "skip-task", "skip-step"):
        raise InputError(f"on_nonfinite is 'raise', 'skip-task' or 'skip-step', not {on_nonfinite!r}")
    named = named_losses(losses)
    weight = _counts(named, counts)
    if processes is not None:
        means, factors = _agree(balancer, named, weight, processes)
    else:
        means, factors = {n: loss for n, loss in named.items() if weight[n] > 0}, None
        if not means:
            raise InputError("no task has a labelled example: there is no loss to differentiate")
    values = torch.stack(list(means.values())).detach()
    bad = _nonfinite(list(means), values)
    if bad and on_nonfinite == "raise":
        raise TrainingError("; ".join(f"the loss of task {n!r} is {v}" for n, v in bad) + ": no gradient was touched")
    skipped = tuple(n for n, _ in bad)
    names = [n for n in means if n not in skipped]
    step = Step(names, [], values, on_nonfinite=on_nonfinite, skipped=skipped, processes=processes)
    if not names or (bad and on_nonfinite == "skip-step"):
        step.names = []
        step.values = values[:0]
        return step
    balancer.bind(names)
    if balancer.logarithmic:
        refuse_negative({n: float(means[n].detach()) for n in names})
    if factors is None:
        # one by one: unstacking a stack would send every pass through all heads, with zeros
        step.scalars = [balancer.transform(named[n]) for n in names]
        step.values = torch.stack(step.scalars).detach()
    else:
        L = torch.stack([means[n] for n in names]).requires_grad_()
        balanced = balancer.transform(L)
        slopes = torch.autograd.grad(balanced.sum(), L)[0].unbind()
        step.scalars = [named[n] * (factors[n] * slope) for n, slope in zip(names, slopes, strict=True)]
        step.values = balanced.detach()
    step.idle = [loss * 0.0 for n, loss in named.items() if n not in means]
    return step


def _counts(named: Mapping[str, Tensor], counts: Counts) -> dict[str, float]:
    if counts is None:
        return dict.fromkeys(named, 1.0)
    missing = [n for n in named if n not in counts]
    if missing:
        raise InputError(f"counts= names {', '.join(counts)}, without the task {missing[0]!r}")
    found = {n: float(counts[n]) for n in named}
    wrong = [n for n, c in found.items() if not (math.isfinite(c) and c >= 0)]
    if wrong:
        raise InputError(f"the count of task {wrong[0]!r} is {found[wrong[0]]}, not a number of examples")
    return found


def _agree(
    balancer: Balancer, named: Mapping[str, Tensor], weight: Mapping[str, float], processes: Processes
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The loss of each task over the examples of all processes, and what each of them multiplies its own by.

    The mean over R processes of :math:`R\\, n_r L_r / \\sum_s n_s` is the mean over all examples.
    """
    if balancer.agreed_in is not processes.group:
        same_start(balancer, list(named), processes)
    assert balancer.tasks is not None
    some = next(iter(named.values()))
    table = torch.zeros(3, len(balancer.tasks), dtype=torch.float64, device=some.device)
    balancer.bind(list(named))
    mine = torch.tensor([weight[n] for n in named], dtype=torch.float64, device=some.device)
    losses = torch.stack([loss.detach() for loss in named.values()]).double()
    at = torch.as_tensor(balancer.active, device=some.device)
    table[:, at] = torch.stack([mine, torch.where(mine > 0, mine * losses, 0.0), torch.ones_like(mine)])
    number, total, given = processes.sum_(table)
    host = torch.stack([number, given]).tolist()
    order = [n for n, present in zip(balancer.tasks, host[1], strict=True) if present]
    partly = [n for n, present in zip(balancer.tasks, host[1], strict=True) if 0 < present < processes.size]
    if partly:
        raise InputError(
            f"the loss of task {partly[0]!r} was given on some processes only: where a process has no label for it, "
            f"give the sum of its outputs times zero, and counts= with {partly[0]!r}: 0"
        )
    found = dict(zip(balancer.tasks, host[0], strict=True))
    means = dict(zip(balancer.tasks, (total / number.clamp_min(1e-300)).to(some.dtype).unbind(), strict=True))
    present = [n for n in order if found[n] > 0]
    if not present:
        raise InputError("no process has a labelled example: there is no loss to differentiate")
    return {n: means[n] for n in present}, {n: processes.size * weight[n] / found[n] for n in present}


def same_start(balancer: Balancer, names: Sequence[str], processes: Processes) -> None:
    """Give all processes the tasks, the state and the random numbers of the first one, once."""
    everyone: list[Any] = processes.objects((list(names), balancer.state_dict()))
    first, state = everyone[0]
    known = state["tasks"] or first
    strangers = [n for theirs, _ in everyone for n in theirs if n not in known]
    if strangers:
        raise InputError(f"the first process does not know the task {strangers[0]!r} that another one has")
    balancer.load_state_dict(state)
    balancer.bind(known)
    balancer.agreed_in = processes.group


def _nonfinite(names: Sequence[str], values: Tensor) -> list[tuple[str, float]]:
    if math.isfinite(values.sum().item()):
        return []
    return [(n, v) for n, v in zip(names, values.tolist(), strict=True) if not math.isfinite(v)]

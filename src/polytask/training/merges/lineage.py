"""What is compared: a base with the experts that came from it, and the tasks that every outcome of a merge is judged by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.merging.matching import skipped
from polytask.merging.statistics import forward, gather_fisher, gather_gramians
from polytask.training.data import TaskData

State = Mapping[str, Tensor]
Model = State | nn.Module
Outcome = Model | Mapping[str, Model]
"""What a candidate gives: one model for all tasks, or one for each by the task's name; a state dict or a module."""

GATHER: dict[str, Callable[[nn.Module, Any], dict[str, Tensor]]] = {
    "gramian": gather_gramians,
    "fisher": gather_fisher,
}
"""How the statistics are gathered that methods ask for, by what they call them."""

BATCH = 256
LEARNED_ON = 16
"""Rows of a task in a step of the methods that learn, as in their papers."""


@dataclass(frozen=True)
class MergeTask:
    """A classification task that merged models are judged by.

    Args:
        name: the task's.
        validation: rows that scales and options are chosen on; inputs as the model takes them, labels under the task's name.
        test: rows that are reported.
        proxy: inputs that statistics may be gathered on; the first validation rows when omitted. Its labels are never used.
    """

    name: str
    validation: TaskData
    test: TaskData
    proxy: TaskData | None = None


@dataclass
class Lineage:
    """A base, the experts fine-tuned from it, and how a state dict becomes a model that runs.

    Args:
        base: the state dict that all experts started from.
        experts: by the task's name.
        build: ``(task, state) -> module`` whose output, or its ``logits``, has shape (examples, classes).
        head: patterns of tensors that every expert keeps for itself, such as ``"classifier.*"``.
        seed: of all random draws, and the number of this lineage where there are several.
        proxies: {task: inputs that statistics are gathered on}; filled by :func:`~polytask.training.merges.compare`.
        unlabelled: {task: rows whose inputs are learned from}, all there are of a proxy, or of validation; filled as well.
        labelled: {task: rows that are learned from with their labels}, the first half of validation; filled as well.
    """

    base: State
    experts: Mapping[str, State]
    build: Callable[[str, State], nn.Module]
    head: tuple[str, ...] = ()
    seed: int = 0
    proxies: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: Mapping[str, TaskData] = field(default_factory=dict)
    labelled: Mapping[str, TaskData] = field(default_factory=dict)
    gathered: dict[str, tuple[list[dict[str, Tensor]], float]] = field(default_factory=dict, repr=False)

    def model(self, task: str, outcome: Outcome) -> nn.Module:
        """The module that serves a task: an outcome's tensors with the expert's own head, or a module as it is.

        Raises:
            InputError: an outcome by tasks has nothing for this one.
        """
        own = outcome if isinstance(outcome, nn.Module) else self._of_task(task, outcome)
        if isinstance(own, nn.Module):
            return own
        expert = self.experts[task]
        state = {n: v for n, v in own.items() if not skipped(n, self.head)}
        return self.build(task, state | {n: v for n, v in expert.items() if skipped(n, self.head)})

    def _of_task(self, task: str, outcome: Mapping[str, Any]) -> Model:
        if all(isinstance(v, Tensor) for v in outcome.values()):
            return outcome
        if task not in outcome:
            raise InputError(
                f"the candidate gives models for {', '.join(map(str, outcome))}, but none for the task {task}"
            )
        found: Model = outcome[task]
        return found

    def batches(self, labels: bool = False) -> dict[str, list[Any]]:
        """What is learned from: {task: inputs, or pairs of inputs and labels, a few rows a batch}, in an order drawn by the seed."""
        found = {}
        for t, data in (self.labelled if labels else self.unlabelled).items():
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed))
            cut = [data.rows(order[i : i + LEARNED_ON]) for i in range(0, len(data), LEARNED_ON)]
            found[t] = [(b.inputs, b.targets[t]) if labels else b.inputs for b in cut]
        return found

    def statistics(self, kind: str) -> list[dict[str, Tensor]]:
        """A statistic of every expert, gathered on its own proxy inputs once.

        Args:
            kind: ``gramian`` or ``fisher``.
        """
        if kind not in self.gathered:
            started = time.perf_counter()
            models = [(self.build(task, state), self.proxies[task]) for task, state in self.experts.items()]
            found = [GATHER[kind](model, [inputs]) for model, inputs in models]
            self.gathered[kind] = (found, time.perf_counter() - started)
        return self.gathered[kind][0]


@torch.no_grad()
def hits(model: nn.Module, task: str, rows: TaskData) -> npt.NDArray[np.uint8]:
    """Which rows a model gets right: 1 or 0, shape (rows,).

    Raises:
        InputError: the output is no table of logits, or has fewer classes than there are labels.
    """
    model.eval()
    y, found = rows.targets[task], []
    for start in range(0, len(rows), BATCH):
        batch = rows.rows(slice(start, start + BATCH))
        logits = forward(model, batch.inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(batch):
            raise InputError(f"the model of the task {task} gives no logits of shape (examples, classes)")
        if int(y.max()) >= logits.shape[1]:
            raise InputError(
                f"the labels of the task {task} go up to {int(y.max())}, but its model has {logits.shape[1]} outputs"
            )
        found.append((logits.argmax(-1) == batch.targets[task]).to(torch.uint8))
    return torch.cat(found).cpu().numpy()

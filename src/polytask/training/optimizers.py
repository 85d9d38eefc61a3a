"""Which optimizer takes the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.models import MultiTaskModel
from polytask.optim import TaskOptimizer
from polytask.registry import find
from polytask.training.config import TrainConfig

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[Tensor]], torch.optim.Optimizer] | str


def optimizer_for(
    model: MultiTaskModel, tasks: Sequence[str], config: TrainConfig, given: OptimizerLike | None, processes: int = 1
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        model: whose parameters it moves.
        tasks: what is learnt.
        config: learning rate and weight decay, where the optimizer is made here.
        given: one of the model's parameters, a function that makes one of them, the name of one of the family ``optim``; or None: AdamW.
        processes: how many share the batch.

    Raises:
        InputError: a name that is none, or an optimizer of single tasks' losses at representation level or in several processes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if given is None:
        return torch.optim.AdamW(parameters, **options)
    if isinstance(given, str):
        made: torch.optim.Optimizer = cast(Any, find(given, "optim").factory).for_tasks(parameters, tasks, **options)
    else:
        made = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
    if isinstance(made, TaskOptimizer):
        if config.level == "representation":
            raise InputError(f"{made.method.name} takes gradients at the parameters: leave out level='representation'")
        if processes > 1:
            raise InputError(f"{made.method.name} keeps gradients of single tasks, which is done in one process only")
        made.bind(tasks, model.shared_parameters() if len(tasks) > 1 else parameters)
    return made

"""What a model predicts on data, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.tasks import Task, Tasks
from polytask.training.data import Inputs, TaskData, TrainingData, rows_of, to_device

Array = npt.NDArray[Any]
Metrics = dict[str, dict[str, float | None]]

#: a constant prediction's loss counts as at least this share of a zero output's, or labels that hardly vary would divide by 0
LEAST_REFERENCE = 1e-3


@torch.no_grad()
def raw_outputs(
    model: nn.Module, tasks: Tasks, inputs: Inputs, batch_size: int = 4096
) -> dict[str, Float[Tensor, "rows *outputs"]]:
    """The raw outputs of the heads on all rows, in evaluation mode, float32 on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    names, n = tuple(tasks), len(rows_of(inputs))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, max(n, 1), batch_size):
            outputs = model(to_device(_slice(inputs, begin, begin + batch_size), device), tasks=names)
            for name in names:
                found[name].append(outputs[name].float().cpu())
    finally:
        model.train(was_training)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def predict_outputs(
    model: nn.Module, tasks: Tasks, inputs: Inputs, batch_size: int = 4096
) -> dict[str, dict[str, Array]]:
    """Predict every row.

    Args:
        model: maps inputs to ``{task: raw output}``.
        tasks: those to predict.
        inputs: a tensor, or nested dicts and lists of tensors, of the same number of rows.
        batch_size: rows at a time; the result does not depend on it.

    Returns:
        {task: {"prediction": ..., "probability": ...}}: predictions in the target's units or as class indices, shape (rows,) or
        (rows, labels); probabilities where the kind has any, shape (rows,) or (rows, classes).
    """
    decoded = tasks.decode(raw_outputs(model, tasks, inputs, batch_size))
    return {name: {what: t.numpy() for what, t in parts.items()} for name, parts in decoded.items()}


def evaluate(
    model: nn.Module, tasks: Tasks, data: TrainingData, batch_size: int = 4096
) -> tuple[dict[str, float | None], Metrics]:
    """The loss and every metric of every task on its labelled rows.

    Returns:
        {task: mean loss} and {task: {metric: value}}; None where a task has no label or a metric is undefined.
    """
    outputs, targets = outputs_and_targets(model, tasks, data, batch_size)
    return losses_of(tasks, outputs, targets), metrics_of(tasks, outputs, targets)


def outputs_and_targets(
    model: nn.Module, tasks: Tasks, data: TrainingData, batch_size: int = 4096
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Raw outputs and labels of all rows on the CPU, from rows in memory or from batches."""
    if isinstance(data, TaskData):
        return raw_outputs(model, tasks, data.inputs, batch_size), to_device(data.targets, "cpu")
    pairs = [(raw_outputs(model, tasks, inputs, batch_size), to_device(targets, "cpu")) for inputs, targets in data]
    known = {n: tuple(n in targets for _, targets in pairs) for n in tasks}
    return (
        {n: torch.cat([o[n] for o, t in pairs if n in t]) for n in tasks if any(known[n])},
        {n: torch.cat([t[n] for _, t in pairs if n in t]) for n in tasks if any(known[n])},
    )


@torch.no_grad()
def losses_of(tasks: Tasks, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, float | None]:
    """{task: mean loss over the labelled rows}."""
    found = tasks.losses(outputs, targets)
    return {n: float(found[n]) if n in found else None for n in tasks}


def metrics_of(tasks: Tasks, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Metrics:
    """{task: {metric: value on the labelled rows}}."""
    found: Metrics = {}
    for name, task in tasks.items():
        found[name] = dict.fromkeys((metric.name for metric in task.metrics), None)
        known = task.kind.labelled(targets[name]) if name in targets else torch.zeros(0, dtype=torch.bool)
        if not bool(known.any()):
            continue
        decoded = {what: t[known].numpy() for what, t in tasks.only([name]).decode(outputs)[name].items()}
        y = targets[name][known].numpy()
        for metric in task.metrics:
            value = metric(y, decoded)
            found[name][metric.name] = value if math.isfinite(value) else None
    return found


def constant_loss(task: Task, output: Float[Tensor, "rows *outputs"], target: Tensor) -> float | None:
    """The mean loss of the best constant raw output on the labelled rows: what a model without features reaches.

    ``output`` gives the shape only; None without labels.
    """
    found = best_constant(task, tuple(output.shape[1:]), target)
    return None if found is None else found[1]


def best_constant(task: Task, shape: tuple[int, ...], target: Tensor) -> tuple[Tensor, float] | None:
    """The constant raw output with the least mean loss on the labelled rows, shape (1, *shape), and that loss.

    Found by L-BFGS from zero, which serves every kind and every own loss alike; None without labels.
    """
    known = task.kind.labelled(target)
    if not bool(known.any()):
        return None
    y = target[known].double() if target.is_floating_point() else target[known]
    constant = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([constant], max_iter=50, line_search_fn="strong_wolfe")

    def charge() -> Tensor:
        return (task.example_loss or task.kind.loss)(constant.expand(len(y), *shape), y).mean()

    def closure() -> float:
        search.zero_grad()
        loss = charge()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.enable_grad():
        at_zero = float(charge().detach())
        search.step(closure)  # type: ignore[no-untyped-call]
        best = float(charge().detach())
    if not best <= at_zero:
        constant = torch.zeros_like(constant)
    return constant.detach(), max(min(best, at_zero), LEAST_REFERENCE * at_zero)


def reference_losses(
    tasks: Tasks, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, float | None]:
    """:func:`constant_loss` of every task; None without labels."""
    return {n: constant_loss(t, outputs[n], targets[n]) if n in targets else None for n, t in tasks.items()}


def explained_share(losses: Mapping[str, float | None], reference: Mapping[str, float | None]) -> dict[str, float]:
    r"""How much of the best constant prediction's loss each task's model explains.

    .. math:: D_k = 1 - L_k / L_k^{const}

    1 is perfect, 0 no better than a constant: R^2 for squared errors, McFadden's pseudo R^2 for cross entropy, explained deviance for
    counts. Bounded above by 1, so that no single task can buy the mean; tasks without labels are left out.
    """
    pairs = {n: (losses[n], reference.get(n)) for n in losses}
    return {n: 1 - loss / base for n, (loss, base) in pairs.items() if loss is not None and base}


def score_of(stop_on: str | None, tasks: Tasks, shares: Mapping[str, float], metrics: Metrics) -> float | None:
    """The number early stopping maximises, None where it is undefined."""
    if stop_on is None or stop_on == "delta_m":
        score = float(np.mean(list(shares.values()))) if shares else None
    else:
        primary = tasks[stop_on].metrics[0]
        value = metrics[stop_on][primary.name]
        score = value if value is None or primary.higher_is_better else -value
    return score if score is not None and math.isfinite(score) else None


def _slice(value: Any, begin: int, end: int) -> Any:
    if isinstance(value, Tensor):
        return value[begin:end]
    if isinstance(value, Mapping):
        return {n: _slice(v, begin, end) for n, v in value.items()}
    return type(value)(_slice(v, begin, end) for v in value)

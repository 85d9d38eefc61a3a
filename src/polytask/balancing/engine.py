"""The one line that replaces ``sum(losses).backward()``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from polytask.autograd import (
    DenseGradients,
    DisjointGradients,
    FanOut,
    Losses,
    Processes,
    Shared,
    TaskGradients,
    apart,
    jacobian,
    leaves,
    partition,
)
from polytask.autograd.fan_out import Select
from polytask.balancing.base import Balancer, LossWeighting
from polytask.balancing.cut import refuse_detours, seeds
from polytask.balancing.exact import exact
from polytask.balancing.looks import looks_again
from polytask.balancing.losses import Counts, OnNonfinite, Step, begin
from polytask.balancing.observation import Observation
from polytask.balancing.weighing import weigh
from polytask.errors import InputError

Level = Literal["auto", "representation", "exact"]
Features = FanOut | Tensor | Mapping[str, FanOut | Tensor] | Sequence[FanOut | Tensor] | None


@torch.enable_grad()
def backward(
    losses: Losses,
    *,
    shared: Shared = None,
    balancer: Balancer | str = "equal",
    features: Features = None,
    level: Level = "auto",
    scaler: torch.amp.GradScaler | None = None,
    observe: bool = False,
    on_nonfinite: OnNonfinite = "raise",
    counts: Counts = None,
    group: Any = "world",
    together: int | Literal["auto", "probe"] = "auto",
) -> Observation:
    r"""Fill ``.grad`` of shared and task parameters with what the balancer makes of the losses.

    Shared parameters receive :math:`\sum_i w_i \nabla L_i` (or what the aggregator returns); parameters that belong
    to one task receive the gradient of their own loss, unless the method weighs the losses themselves. Like
    ``Tensor.backward``, gradients are **added** to what ``.grad`` already holds.

    Where torch.distributed runs, every process calls this with the losses of its own examples, and all of them take the step of one
    process with all examples. At exact level the gradients are averaged here, whether or not the model is wrapped; otherwise wrap it
    in ``DistributedDataParallel`` or ``fully_shard``, which average what this function leaves: beyond that K x K numbers are exchanged,
    and the gradients at the features where a method needs their coordinates.

    Args:
        losses: {task: scalar}, a sequence of scalars, or a tensor of shape (tasks,), all with graph. Absent tasks are left out.
        shared: the parameters to be balanced. ``{name: parameters}`` makes groups of them, each balanced apart among the tasks that touch
            it. When omitted: all that at least two losses reach, those with the same readers in one group; to be given where
            ``torch.compile`` made one function of several heads, all of which every loss then seems to reach.
        balancer: a balancer, kept by the caller from step to step; or the name of one without state.
        features: the shared representation(s) z on which all shared influence passes: ``model.features`` of a
            :class:`~polytask.MultiTaskModel`, or the tensors themselves.
        level: ``exact`` takes gradients at the parameters (K backward passes); ``representation`` takes them at ``features``
            (one pass through the trunk; an upper-bound surrogate); ``auto`` prefers the second where features are given and the method
            does not compare gradients of several steps.
        scaler: the gradient scaler of mixed precision; the gradients then stand scaled, as ``scaler.unscale_`` and ``scaler.step`` expect.
            Where one that the method looks at overflows, ``.grad`` tells the scaler so, and the balancer sees nothing of the step.
            Methods that read loss values only look at no gradient: they learn from the finite losses of a step that the scaler skips too.
        observe: let methods that need loss values only report the Gramian too, where ``features`` make it free.
        on_nonfinite: what to do about a task whose loss, or whose gradient where the method looks at it, is not finite: ``raise``;
            ``skip-task``, as if it were absent; ``skip-step``, which leaves ``.grad`` as it was. The observation tells. Under
            ``DistributedDataParallel`` a wrapper that waits for all heads allows the first and the last.
        counts: {task: labelled examples that its loss is the mean of}, by which the losses of several processes are averaged; equal when
            omitted. Every process gives the loss of every task: where it has no label, its outputs' sum times zero and a count of 0.
        group: the processes that share the batch: ``world``, a ``ProcessGroup``, or None for this process alone.
        together: at exact level, how many losses one batched backward pass takes: a number; ``probe`` measures 1, 2, 4, 8 and all in the
            first step of a model's shape and keeps the fastest, which the balancer's ``state_dict`` remembers, so that a restarted run
            takes the same steps; ``auto`` probes on accelerators and takes 1 on CPUs, where batched passes did not win.

    Returns:
        What the step saw: losses, weights, Gramian. The same as ``balancer.observation``.

    Raises:
        InputError: losses that are not scalars with graph, that are given twice, shared parameters no loss reaches, ``level``
            without ``features``; always before any ``.grad`` is touched.
        TrainingError: a loss or a task's gradient that is not finite; the message names the task.

    Cost: one backward pass for loss weightings and at representation level. At exact level K passes and K x P numbers; where those
    would exceed 256 MiB, or wide linear layers meet few examples, Gramian methods take their Gramian layer by layer instead: K passes
    that form no weight gradients where inner products are cheaper without, and one pass of the weighted losses; in the first step of a
    balancer one pass and P numbers more, which compare them with the engine's. Between R processes
    at exact level the Jacobian is reduce-scattered, its Gramian all-reduced and the direction gathered.
    """
    if isinstance(balancer, str):
        from polytask.balancing import make

        balancer = make(balancer)
    if not isinstance(balancer, Balancer):
        raise InputError(f"balancer= is a balancing method or its name, not {balancer!r}")
    if level not in get_args(Level):
        raise InputError(f"level= is {', '.join(map(repr, get_args(Level)))}, not {level!r}")
    if looks_again(balancer):
        raise InputError(
            f"{balancer.method.name} looks at the model more than once a step: call polytask.backward_batches(evaluate, batches, ...)"
        )
    if together not in ("auto", "probe") and not (isinstance(together, int) and together >= 1):
        raise InputError(f"a backward pass takes 1, 2, 3 ... losses, 'probe' or 'auto', not together={together!r}")
    step = begin(balancer, losses, counts, on_nonfinite, Processes.of(group))
    step.together = together
    if not step.names:
        balancer.observation = step.not_taken("none", ())
        return balancer.observation
    if scaler is not None and scaler.is_enabled():
        # asking a scaler to scale is what makes a fresh one ready for unscale_ and step
        step.scale, step.scaled = float(scaler.scale(torch.ones(()))), True
    ports = _features(features)
    at_parameters = level == "exact" or (level == "auto" and (not ports or balancer.remembers_gradients))
    if isinstance(balancer, LossWeighting) or not at_parameters:
        _check_shared(balancer, step, shared)
    if isinstance(balancer, LossWeighting):
        observation = _values(balancer, step, ports if observe else [])
    elif at_parameters:
        observation = _exact(balancer, step, shared)
    elif not ports:
        raise InputError("level='representation' needs features=: the shared representation that every head reads")
    elif len(ports) == 1 and isinstance(ports[0], FanOut):
        observation = _one_pass(balancer, step, ports[0])
    else:
        observation = _two_passes(balancer, step, [f.tensor if isinstance(f, FanOut) else f for f in ports])
    balancer.observation = observation
    return observation


def _check_shared(balancer: Balancer, step: Step, shared: Shared) -> None:
    """Whether the parameters called shared are, also where no gradient is taken at them; a walk over the graph, in the first step only."""
    if shared is None or balancer.observation is not None or step.processes is not None:
        return
    try:
        reached = [leaves(loss, complete=True) for loss in step.scalars]
    except InputError:  # reentrant checkpoints hide parameters, which only exact gradients mind
        return
    partition(step.names, len(step.names) == len(balancer.tasks or ()), reached, shared)


def _exact(balancer: Balancer, step: Step, shared: Shared) -> Observation:
    try:
        return exact(balancer, step, shared)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise InputError(
            "the compiled part of the model gives its buffers away in its first backward pass, and exact gradients of several losses need "
            "more than one: set torch._functorch.config.donated_buffer = False before the first step, or balance at level='representation'"
        ) from error


def _features(features: Features) -> list[FanOut | Tensor]:
    if features is None:
        return []
    if isinstance(features, FanOut | Tensor):
        given = [features]
    elif isinstance(features, str) or not isinstance(features, Iterable):
        raise InputError(f"features= is a tensor, or several in a dict or a sequence, not {type(features).__name__}")
    else:
        given = list(features.values()) if isinstance(features, Mapping) else list(features)
    for f in given:
        if not isinstance(f, FanOut | Tensor):
            raise InputError(f"features= holds tensors, and one of those given is of type {type(f).__name__}")
        if isinstance(f, Tensor) and not f.requires_grad:
            raise InputError(
                f"the representation of shape {tuple(f.shape)} given as features= has no graph: it is not that of this forward pass"
            )
    return given


def _values(balancer: LossWeighting, step: Step, ports: list[FanOut | Tensor]) -> Observation:
    names = step.names
    losses = torch.stack(step.scalars)
    if step.processes is None:
        total, weights = balancer.combine(losses)
    else:  # weights from the losses of all processes, for the losses of this one
        weights = step.processes.first(balancer.combine(step.values)[1].clone())
        total = (weights * losses).sum()
    observation = Observation(tuple(names), step.values, weights, None, "values", step.skipped)
    if step.idle:
        total = total + torch.stack(step.idle).sum()
    port = ports[0] if len(ports) == 1 and isinstance(ports[0], FanOut) else None
    if port is not None:

        def watch(present: frozenset[str], select: Select) -> Tensor:
            if present >= set(names):
                w = (weights * step.scale).double()
                seen = _everywhere(select(names), step.processes)
                observation.gramian = seen.gramian() / torch.outer(w, w)
            everyone = [n for n in port.junction.tasks if n in present]
            return select(everyone).combination(total.new_ones(len(everyone)))

        port.junction.combine, port.junction.workspace = watch, balancer.workspace
    try:
        (total * step.scale if step.scale != 1.0 else total).backward()  # type: ignore[no-untyped-call]
    finally:
        if port is not None:
            port.junction.combine = None
    return observation


def _everywhere(gradients: TaskGradients, processes: Processes | None) -> TaskGradients:
    return gradients if processes is None else DisjointGradients(gradients, processes)


def _one_pass(balancer: Balancer, step: Step, port: FanOut) -> Observation:
    seen: list[Observation] = []

    def combine(reached: frozenset[str], select: Select) -> Tensor:
        present = [n for n in step.names if n in reached]
        some = step
        if present != step.names:
            balancer.bind(present)
            some = step.some(present)
        gradients = _everywhere(select(present), step.processes)
        direction, observation = weigh(balancer, gradients, some, "representation")
        seen.append(observation)
        return torch.zeros_like(port.tensor).flatten() if direction is None else direction

    memory = _Memory(step, [port.tensor])
    port.junction.combine, port.junction.workspace = combine, balancer.workspace
    try:
        step.total.backward()  # type: ignore[no-untyped-call]
    finally:
        port.junction.combine = None
    if not seen:
        raise InputError("no loss depends on the given features: is this the representation of the same forward pass?")
    memory.restore(seen[0])
    return seen[0]


class _Memory:
    """What ``.grad`` held before a pass that may find out on its way that it should not have begun; empty where errors are raised."""

    def __init__(self, step: Step, features: list[Tensor]) -> None:
        self.before: dict[Tensor, Tensor | None] = {}
        self.heads: dict[str, list[Tensor]] = {}
        self.everything: list[Tensor] = []
        if step.on_nonfinite != "raise" and not step.scaled:
            self.heads = {n: leaves(s, stop_at=features) for n, s in zip(step.names, step.scalars, strict=True)}
            self.everything = leaves(step.total)
            self.before = {p: None if p.grad is None else p.grad.clone() for p in self.everything}

    def restore(self, seen: Observation) -> None:
        """Undo the pass for the heads of the tasks left out, or for all parameters where the step is not taken."""
        left_out = [p for n in seen.skipped for p in self.heads.get(n, ())]
        for p in left_out if seen.taken else self.everything:
            p.grad = self.before[p]


def _two_passes(balancer: Balancer, step: Step, features: list[Tensor]) -> Observation:
    """Plain tensors that all heads read: each loss back to the features, then the trunk once."""
    if balancer.observation is None:
        refuse_detours(dict(zip(step.names, step.scalars, strict=True)), features)
    rows, _ = jacobian(step.scaled_losses, features, retain_graph=True, workspace=balancer.workspace)
    reached = rows.any()
    if step.processes is not None:
        reached = step.processes.sum_(reached.int()) > 0
    if not bool(reached):
        raise InputError("no loss depends on the given features: is this the representation of the same forward pass?")
    direction, observation = weigh(balancer, _everywhere(DenseGradients(rows), step.processes), step, "representation")
    if direction is None:
        return observation
    left_out = observation.skipped if observation.taken else ()
    total = step.some([n for n in step.names if n not in left_out]).total
    heads = leaves(total, stop_at=features)
    if heads:
        torch.autograd.backward(total, inputs=heads, retain_graph=True)
    torch.autograd.backward(features, seeds(features, apart(direction, features)))
    return observation

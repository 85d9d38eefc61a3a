"""Steps of methods that look at several batches, or at the model more than once; and whole steps of any method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polytask.autograd import Processes, Shared, apart
from polytask.balancing.base import Balancer, GramianWeighting, precision_of
from polytask.balancing.engine import Features, Level, backward
from polytask.balancing.looks import CountsOf, Evaluate, Evaluations, LookingBalancer, Looks, Overflow, looks_again
from polytask.balancing.observation import Observation
from polytask.errors import InputError, TrainingError


def backward_batches(
    evaluate: Evaluate,
    batches: Sequence[Any],
    *,
    balancer: Balancer | str,
    shared: Shared = None,
    features: Callable[[], Features] | None = None,
    level: Level = "auto",
    scaler: torch.amp.GradScaler | None = None,
    on_nonfinite: Literal["raise", "skip-step"] = "raise",
    counts: CountsOf = None,
    group: Any = "world",
) -> Observation:
    r"""Fill ``.grad`` by a method that looks at several batches, or at other parameters than the present ones.

    The method asks for losses; ``evaluate`` finds them, at the parameters as they stand when it is called. ``balancer.roles`` says how
    many batches a step takes and what for: ``("train",)`` for most methods, ``("train", "train", "train")`` for MoDo,
    ``("train", "validation")`` for Auto-Lambda. They are to be drawn independently of one another. The last training batch is
    followed: its gradients make the step, the others only choose how. ``.grad`` is added to as by :func:`polytask.backward`, to which
    methods that look once are handed on. Gradients are taken at the parameters (those of representations of different rows cannot be
    multiplied), and a method that moves the parameters puts them back bit by bit.

    BatchNorm's averages move at the first look at each training batch only; repeated looks at a batch see the same dropout masks, as
    far as they come from torch's generators. A task counts as absent where one of the training batches lacks it.

    Args:
        evaluate: batch -> losses: {task: scalar with graph}, or what else :func:`polytask.backward` takes.
        batches: anything that ``evaluate`` takes, one for each entry of ``balancer.roles``.
        balancer: kept by the caller from step to step; or the name of one without state.
        shared: the parameters to be balanced, as for :func:`polytask.backward`; groups are balanced together.
        features: called after the evaluation for the shared representation; of use to methods that look once.
        level: as for :func:`polytask.backward`; methods that look again know ``exact`` only.
        scaler: the gradient scaler of mixed precision. ``.grad`` stands scaled; an overflow in any look makes the scaler skip the step, of
            which the balancer then sees nothing.
        on_nonfinite: what to do about a loss or gradient that is not finite: ``raise``, or ``skip-step``, which leaves ``.grad`` as it was.
        counts: batch -> {task: labelled examples that its loss is the mean of}, where processes share every batch; as for
            :func:`polytask.backward`. ``evaluate`` calls the bare model then, not one wrapped for several processes.
        group: the processes that share the batches: ``world``, a ``ProcessGroup``, or None for this process alone.

    Returns:
        What the step saw of the batch that is followed; the Gramian where the method took its gradients or another training batch's.

    Raises:
        InputError: another number of batches than the method takes, or what :func:`polytask.backward` refuses;
            ``level="representation"`` for a method that looks again. Before any ``.grad`` is touched.
        TrainingError: a loss or gradient that is not finite.

    Cost: see each method; between processes one all-reduce of each gradient taken.

    Example:
        >>> import torch, polytask
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> modo = polytask.balancing.make("modo")
        >>> def evaluate(batch):
        ...     error = theta - batch
        ...     return {"first": error[0] ** 2, "both": (error**2).sum()}
        >>> batches = [torch.tensor(noise) for noise in ([0.1, -0.1], [-0.1, 0.0], [0.0, 0.2])]
        >>> seen = polytask.backward_batches(evaluate, batches, balancer=modo, shared=[theta])
        >>> seen.tasks, len(modo.roles), theta.grad.shape
        (('first', 'both'), 3, torch.Size([2]))
    """
    balancer = _made(balancer)
    _check(balancer, batches, level)
    return _step(
        Evaluations(evaluate, batches, balancer.roles),
        balancer,
        shared,
        features,
        level,
        scaler,
        on_nonfinite,
        counts,
        group,
    )


def step(
    evaluate: Evaluate,
    batches: Sequence[Any],
    *,
    optimizer: torch.optim.Optimizer,
    balancer: Balancer | str,
    clip_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> Observation:
    """A whole step of any method: gradients anew, clipped, the optimizer's step, and the second look of the methods that ask for one.

    Args:
        evaluate: batch -> losses, at the parameters as they stand.
        batches: one for each entry of ``balancer.roles``: a list of one batch for most methods.
        optimizer: of shared and task parameters.
        balancer: kept by the caller from step to step; or the name of one without state.
        clip_norm: greatest norm of the balanced gradient; None does not clip.
        scaler: the gradient scaler of mixed precision, updated here.
        options: of :func:`backward_batches`.

    Returns:
        What the step saw.

    Raises:
        InputError, TrainingError: as :func:`backward_batches`; no step is taken.
    """
    known = {
        "shared": None,
        "features": None,
        "level": "auto",
        "on_nonfinite": "raise",
        "counts": None,
        "group": "world",
    }
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"polytask.step has no option {unknown[0]!r}; it hands on {', '.join(known)}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS evaluates the losses as often as it likes: polytask.step takes optimizers that need one gradient a step"
        )
    chosen: dict[str, Any] = {**known, **options}
    balancer = _made(balancer)
    _check(balancer, batches, chosen["level"])
    evaluations = Evaluations(evaluate, batches, balancer.roles)
    optimizer.zero_grad()
    seen = _step(evaluations, balancer, scaler=scaler, **chosen)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None for p in parameters):
        return seen
    if scaler is not None:
        scaler.unscale_(optimizer)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    if balancer.needs_second_evaluation and seen.taken:
        with torch.no_grad():
            again = evaluations(0)
        named = again if isinstance(again, dict) else {str(i): loss for i, loss in enumerate(again)}
        counts = chosen["counts"]
        balancer.after_step(named, None if counts is None else counts(batches[0]))
    return seen


def _made(balancer: Balancer | str) -> Balancer:
    if not isinstance(balancer, str):
        return balancer
    from polytask.balancing import make

    return make(balancer)


def _check(balancer: Balancer, batches: Sequence[Any], level: Level) -> None:
    name, roles = balancer.method.name, balancer.roles
    if len(batches) != len(roles):
        kinds = f"{len(roles)} batches ({', '.join(roles)})" if len(roles) > 1 else "1 batch"
        raise InputError(f"{name} takes {kinds} a step, not {len(batches)}")
    if not looks_again(balancer):
        return
    if level == "representation":
        raise InputError(f"{name} takes gradients at the parameters: those of representations differ in every batch")


def _step(
    evaluations: Evaluations,
    balancer: Balancer,
    shared: Shared,
    features: Callable[[], Features] | None,
    level: Level,
    scaler: torch.amp.GradScaler | None,
    on_nonfinite: Literal["raise", "skip-step"],
    counts: CountsOf,
    group: Any,
) -> Observation:
    if not looks_again(balancer):
        losses = evaluations(0)
        found = features() if features is not None else None
        return backward(
            losses,
            shared=shared,
            balancer=balancer,
            features=found,
            level=level,
            scaler=scaler,
            on_nonfinite=on_nonfinite,
            counts=None if counts is None else counts(evaluations.batches[0]),
            group=group,
        )
    scaled = scaler is not None and scaler.is_enabled()
    scale = float(scaler.scale(torch.ones(()))) if scaler is not None and scaled else 1.0
    nothing = Observation((), torch.zeros(0), None, None, "none", taken=False)
    try:
        looks = Looks(balancer, evaluations, shared, scale, scaled, processes=Processes.of(group), counts=counts)
    except TrainingError:
        if on_nonfinite == "raise":
            raise
        balancer.observation = nothing
        return nothing
    if not looks.names:
        balancer.observation = nothing
        return nothing
    balancer.observation = _looked(balancer, looks, scale, on_nonfinite)
    return balancer.observation


def _looked(balancer: Balancer, looks: Looks, scale: float, on_nonfinite: str) -> Observation:
    """Let the method look, and write what it finds; nothing of a step that is not taken stays behind."""
    before = balancer.state_dict() if looks.watched or on_nonfinite == "skip-step" else None
    seen = Observation(tuple(looks.names), looks.values, None, None, "exact", taken=False)
    try:
        if isinstance(balancer, LookingBalancer):
            direction, weights = balancer.take(looks)
        else:
            assert isinstance(balancer, GramianWeighting)
            direction, weights = _by_cross_gramian(balancer, looks)
    except (Overflow, TrainingError) as error:
        if before is not None:
            balancer.load_state_dict(before)
        if isinstance(error, Overflow):
            _add(looks.theta, [torch.full_like(p, torch.nan) for p in looks.theta])
        elif on_nonfinite == "raise":
            raise
        return seen
    _add(looks.theta, apart(direction * scale, looks.theta))
    seen.weights = None if weights is None else weights.to(looks.values)
    seen.gramian, seen.taken = looks.gramian, True
    return seen


def _by_cross_gramian(balancer: GramianWeighting, looks: Looks) -> tuple[Tensor, Tensor]:
    r"""Weights from :math:`M = G_1 G_2^\top` of two batches, free of the bias of one batch's Gramian, for the gradients of a third."""
    found = balancer.reuse()
    if found is None:
        G1, G2 = (looks.rows(i, heads=False) for i in range(2))
        wide = torch.promote_types(G1.dtype, torch.float32)
        M = (G1.to(wide) @ G2.to(wide).T).double().cpu().numpy()
        squares = (G1.to(wide).norm(dim=1) * G2.to(wide).norm(dim=1)).double().cpu().numpy()
        found = balancer.weights_of(M, looks.values.double().cpu().numpy(), precision_of(G1), squares)
    w = torch.from_numpy(found).to(looks.values.device)
    return looks.slope(looks.followed, w, heads=False), w


def _add(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.detach().clone() if p.grad is None else p.grad + g

"""Candidates that are more than a merged state dict: coefficients learned on inputs, masks a task, routed experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from polytask.errors import InputError
from polytask.merging.adaptive import Adaptive, adapt
from polytask.merging.base import Merger
from polytask.merging.in_memory import merge, merging_method
from polytask.merging.masked import pack
from polytask.merging.masking import KeptApart
from polytask.merging.matching import skipped
from polytask.merging.routing import Routing
from polytask.registry import Method, methods
from polytask.training.merges.candidates import TRIALS, Candidate, merged
from polytask.training.merges.lineage import Lineage, Outcome

FROM_LABELS = ("frank_wolfe",)
"""Methods that learn from labels in their papers, though they can do without."""

SCALED: dict[str, tuple[float, ...]] = {"concrete": (), "adarank": (2.0,)}
"""Methods that are given a scale to learn from, and what is tried beside their default: these, or the mean's."""

STRIDES = (0.03, 0.3, 1.0)
"""From the authors' stride to Frank and Wolfe's own."""

SCALES = (0.5, 0.25, 1.0)
"""Of what experts have in common, for methods that keep them apart and have a scale."""


def system(method: Method, options: Mapping[str, Any], label: str = "", *, experts: int = 0) -> Candidate:
    """A registered method that runs the model, or gives more than one model of the base's size, as a candidate.

    These methods fit themselves: only where they start from is searched by itself, at the papers' 0.3 of all task vectors and at their
    mean, how far they may walk, and the scale of a sum that experts come out of. They learn from all inputs there are, and from labels
    where their papers do or options say so.

    Args:
        method: from the registry.
        options: a list is searched on validation, anything else is fixed.
        label: for people.
        experts: T, 0 to search nothing but lists.

    Raises:
        InputError: an option that the method has not.
    """
    own = [o for o in method.options if o != "expert"]
    unknown = [o for o in options if o not in own]
    if unknown:
        raise InputError(f"{method.name} has no option {unknown[0]!r}; it takes {', '.join(own) or 'none'}")
    axes = {n: tuple(v) for n, v in options.items() if isinstance(v, list)}
    fixed = {n: v for n, v in options.items() if n not in axes}
    if experts:
        mean = round(1 / experts, 4)
        tried: dict[str, tuple[Any, ...]] = {"start": (method.options.get("start"), mean), "stride": STRIDES}
        if issubclass(method.factory, KeptApart):  # type: ignore[arg-type]
            tried["scale"] = SCALES
        if method.name in SCALED:
            tried["scale"] = (method.options["scale"], *(SCALED[method.name] or (mean,)))
        axes |= {n: tuple(dict.fromkeys(v)) for n, v in tried.items() if n in method.options and n not in options}
    if method.name in FROM_LABELS:
        fixed.setdefault("labels", True)
    run, role, statistic = _kind(method)
    return Candidate(
        method.name,
        partial(run, method),
        axes,
        label or method.name,
        role,
        statistic,
        fixed,
        bool(fixed.get("labels")),
    )


def _kind(method: Method) -> tuple[Callable[..., Outcome], str, str | None]:
    """How a method is run, what comes out, and which statistic it needs."""
    kind: Any = method.factory
    if issubclass(kind, Adaptive):
        return _adapted, "method", None
    if issubclass(kind, KeptApart):
        return _masked, "a mask for each task", None
    return _routed, "routed experts", kind.statistic


def candidate(
    name: str,
    *,
    experts: int,
    trials: int = TRIALS,
    options: Mapping[str, Any] | None = None,
    filters: Sequence[str] = (),
) -> Candidate:
    """A registered method of merging as a candidate; see :func:`~polytask.training.merges.merged`.

    Raises:
        InputError: unknown method, filter or option; filters before a method that takes none.
    """
    found = merging_method(name)
    if issubclass(found.factory, Merger) and not issubclass(found.factory, KeptApart):  # type: ignore[arg-type]
        return merged(name, experts=experts, trials=trials, options=options, filters=filters)
    if filters:
        raise InputError(f"no filter can go before {found.name}")
    return system(found, options or {}, experts=experts)


def every_method(experts: int, trials: int = TRIALS) -> tuple[list[Candidate], dict[str, str]]:
    """All registered methods that can take part, and why the others cannot: {name: reason}."""
    taking_part, left_out = [], {}
    for method in methods("merging"):
        try:
            taking_part.append(candidate(method.name, experts=experts, trials=trials))
        except InputError as error:
            left_out[method.name] = str(error)
    return taking_part, left_out


def _adapted(method: Method, lineage: Lineage, **options: Any) -> Outcome:
    first, state = next(iter(lineage.experts.items()))
    kind: type[Adaptive] = method.factory  # type: ignore[assignment]
    few = {t: [x] for t, x in lineage.proxies.items()}
    return adapt(
        lineage.build(first, state),
        lineage.base,
        lineage.experts,
        lineage.batches(bool(options.get("labels"))) if kind.learns else few,
        method.name,
        skip=lineage.head,
        seed=lineage.seed,
        check=False,  # validation rows tell
        **options,
    )


def _masked(method: Method, lineage: Lineage, **options: Any) -> Outcome:
    packed = pack(lineage.base, lineage.experts, method.name, skip=lineage.head, seed=lineage.seed, **options)
    return {task: packed.expert(task) for task in lineage.experts}


def _routed(method: Method, lineage: Lineage, **options: Any) -> Outcome:
    """The merged model, or the base, with routed experts, once with each task's head: routing itself is told no task."""
    routing: Routing = method.factory(**options)
    own = [{n: v for n, v in e.items() if not skipped(n, lineage.head)} for e in lineage.experts.values()]
    experts = dict(zip(lineage.experts, own, strict=True))
    gramians = lineage.statistics(routing.statistic) if routing.statistic is not None else []
    state = merge(
        lineage.base,
        lineage.experts,
        routing.static,
        skip=lineage.head,
        statistics=gramians,
        seed=lineage.seed,
        **routing.static_options,
    )
    shared = [{n: S for n, S in found.items() if not skipped(n, lineage.head)} for found in gramians]
    return {task: routing.route(lineage.model(task, state), experts, shared) for task in lineage.experts}

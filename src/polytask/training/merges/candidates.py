"""What is put side by side: the experts, the base, task arithmetic, every merging method, and whatever else gives models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from polytask.errors import InputError
from polytask.merging import make, make_filter, merge
from polytask.merging.base import Merger
from polytask.registry import Method, find
from polytask.training.merges.lineage import Lineage, Outcome

EXPERTS, BASE, BASELINE = "experts", "base", "task_arithmetic"
TRIALS = 12

MAIN: dict[str, tuple[float, ...]] = {
    "density": (0.1, 0.2, 0.5, 0.9),
    "della.density": (0.15, 0.3, 0.5, 0.8),
    "della_linear.density": (0.15, 0.3, 0.5, 0.8),
    "select": (0.1, 0.2, 0.5, 0.9),
    "rank": (0.04, 0.08, 0.16, 0.32),
    "common": (0.4, 0.6, 0.8, 0.9),
    "threshold": (0.2, 0.4, 0.6, 0.8),
    "regmean.alpha": (0.1, 0.5, 0.7, 0.9, 0.95, 1.0),
    "opcm.alpha": (0.3, 0.5, 0.7, 0.9),
    "doge.eta": (0.07, 0.2, 0.6, 2.0),
    "quantile": (0.8, 0.9, 0.97, 0.99),
}
"""The option beside the scale that a method is tuned by (of one method alone: with its name), and values for it."""


@dataclass(frozen=True)
class Candidate:
    """Something that gives models for the tasks.

    Args:
        name: what it is called, once in a comparison.
        make: ``(lineage, **options) -> outcome``: one state dict or module for all tasks, or {task: state dict or module}.
        axes: {option: values}, chosen on validation one option after another, in this order; the first value holds until then.
        label: for people; the name when omitted.
        role: ``reference``, ``baseline`` or ``method``.
        statistic: what must be gathered before, timed apart: ``gramian`` or ``fisher``.
        fixed: options that are not chosen; they are handed to ``make`` too.
        labels: whether it learns from labels: from those of the first half of the validation rows, and is judged by the second.
    """

    name: str
    make: Callable[..., Outcome]
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    label: str = ""
    role: str = "method"
    statistic: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = False


def references() -> list[Candidate]:
    """The experts themselves, each on its own task, and the base with each expert's head."""
    return [
        Candidate(EXPERTS, lambda lineage: dict(lineage.experts), label="each expert on its task", role="reference"),
        Candidate(BASE, lambda lineage: lineage.base, label="base, experts' heads", role="reference"),
    ]


def merged(
    name: str,
    *,
    experts: int,
    trials: int = TRIALS,
    options: Mapping[str, Any] | None = None,
    filters: Sequence[str] = (),
    label: str = "",
) -> Candidate:
    """A registered merging method as a candidate.

    Args:
        name: see ``polytask methods --family merging``.
        experts: T; scales are searched from a quarter of 1/T, below the mean of all task vectors, to 4.
        trials: settings tried on validation, for every method the same number unless it has fewer.
        options: a list is searched instead of our own grid, anything else is fixed.
        filters: names of filters put before it.
        label: for people.

    Raises:
        InputError: unknown method, filter or option.
    """
    method = find(name, family="merging")
    said = dict(options or {})
    axes = {n: tuple(v) for n, v in said.items() if isinstance(v, list)}
    fixed = {n: v for n, v in said.items() if n not in axes}
    if "scale" not in said and not axes:
        axes = grid(method, experts, trials, fixed)
    full = "+".join([*(make_filter(f).method.name for f in filters), method.name])
    merger = make(method.name, **{n: v[0] for n, v in axes.items()}, **fixed)
    merger.check_experts(experts)
    role = "baseline" if full == BASELINE else "method"
    statistic = merger.statistic if merger.needs == "statistics" else None
    run = partial(_run, method, tuple(filters))
    return Candidate(full, run, axes, label or full, role, statistic, fixed)


def grid(method: Method, experts: int, trials: int, fixed: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The values that are tried of the scale and of the method's main option, as many settings as there are trials."""
    own = {o: f"{method.name}.{o}" if f"{method.name}.{o}" in MAIN else o for o in method.options if o not in fixed}
    main = next((o for o, key in own.items() if key in MAIN), None)
    has_scale = "scale" in method.options
    axes: dict[str, tuple[Any, ...]] = {}
    beside: tuple[Any, ...] = ()
    if main is not None:
        default = method.options[main]
        others = [v for v in MAIN[own[main]] if v != default]
        beside = (default, *others[: max(0, trials - 1 if not has_scale else trials // 3)])
    if has_scale:
        axes["scale"] = tuple(
            round(float(s), 4) for s in np.geomspace(0.25 / experts, 4, trials - max(0, len(beside) - 1))
        )
    if len(beside) > 1:
        axes[str(main)] = beside
    return axes


def _run(method: Method, filters: tuple[str, ...], lineage: Lineage, **options: Any) -> Outcome:
    needed: type[Merger] = method.factory  # type: ignore[assignment]
    return merge(
        lineage.base if needed.needs != "experts" else None,
        lineage.experts,
        method.name,
        filters=filters,
        skip=lineage.head,
        statistics=lineage.statistics(str(needed.statistic)) if needed.needs == "statistics" else (),
        seed=lineage.seed,
        **options,
    )


def in_order(candidates: Iterable[Candidate], experts: int, trials: int) -> list[Candidate]:
    """The references and task arithmetic first, then the others; every name once.

    Raises:
        InputError: two candidates of one name.
    """
    given = list(candidates)
    first = [*references(), *(c for c in given if c.name == BASELINE)]
    if len(first) == len(references()):
        first.append(merged(BASELINE, experts=experts, trials=trials))
    everyone = [*first, *(c for c in given if c.name != BASELINE)]
    names = [c.name for c in everyone]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise InputError(f"two candidates are called {twice!r}: give one of them another name")
    return everyone

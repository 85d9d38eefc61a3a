"""Merging state dicts that are in memory already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.base import Filter, Merger
from polytask.merging.engine import Engine, check_finite, written_as
from polytask.merging.matching import Spec, compute_dtype, dtype_of, match
from polytask.registry import Method, find

State = Mapping[str, Tensor]


def make(name: str, **options: Any) -> Merger:
    """Build a merging method by its registered name or an alias.

    Args:
        name: see ``polytask methods --family merging``.
        options: the method's own.

    Raises:
        InputError: unknown name or option; the message names the nearest ones.
    """
    merger: Merger = _built(find(name, family="merging"), options)
    return merger


def make_filter(name: str, **options: Any) -> Filter:
    """Build a filter of task vectors by its registered name or an alias.

    Args:
        name: see ``polytask methods --family filter``; options may follow in the same text, as in ``"trim:density=0.1,scope=model"``.
        options: the filter's own.

    Raises:
        InputError: unknown name or option.
    """
    name, sign, text = name.partition(":")
    for setting in text.split(",") if sign else ():
        option, equals, value = setting.partition("=")
        if not (option and equals and value):
            raise InputError(f"options of a filter are written {name}:OPTION=VALUE,OPTION=VALUE, not {name}:{text}")
        options[option] = yaml.safe_load(value)
    found: Filter = _built(find(name, family="filter"), options)
    return found


def _built(method: Method, options: Mapping[str, Any]) -> Any:
    unknown = [o for o in options if o not in method.options]
    if unknown:
        raise InputError(f"{method.name} has no option {unknown[0]!r}; it takes {', '.join(method.options) or 'none'}")
    return method.factory(**options)


def merge(
    base: State | None,
    experts: Sequence[State] | Mapping[str, State],
    method: str = "task_arithmetic",
    *,
    filters: Sequence[Filter | str] = (),
    skip: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    statistics: Sequence[Mapping[str, Tensor]] = (),
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge fine-tuned models into one.

    Floating-point tensors are merged, in float32 or, where one of them is, float64. Integer and boolean buffers and skipped tensors are
    the base's (the first expert's where there is no base). Tensors tied in every model stay tied.

    Args:
        base: the state dict that the experts were fine-tuned from; None for methods that do without.
        experts: the fine-tuned state dicts, in a sequence or by name; the names appear in messages.
        method: see ``polytask methods --family merging``.
        filters: maps of task vectors to be applied before the method, by name or as objects.
        skip: patterns of tensors that are not merged, such as ``"head.*"``; the models may differ in them.
        dtype: of the merged tensors; the base's when omitted.
        statistics: for each expert the statistics of its tensors, for methods that need them; see
            :func:`~polytask.merging.gather_gramians` and :func:`~polytask.merging.gather_fisher`.
        seed: of all random draws.
        progress: called with the name of each tensor when it is done.
        options: the method's own.

    Returns:
        The merged state dict, with the tensors of the base (of the first expert where there is no base), in their order.

    Raises:
        InputError: models that do not fit together, NaN in a tensor, an unknown method or option.

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> merge(base, [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}], "task_arithmetic", scale=0.5)
        {'w': tensor([0.5000, 1.0000])}
    """
    named = dict(experts) if isinstance(experts, Mapping) else {f"expert {i}": s for i, s in enumerate(experts, 1)}
    if not named:
        raise InputError("there is nothing to merge: no expert was given")
    merger = make(method, **options)
    models = ([("the base", base)] if base is not None else []) + list(named.items())
    out = dtype_of(dtype) if isinstance(dtype, str) else dtype
    found = match([(label, specs(s, label)) for label, s in models], skip, mixed_dtypes=out is not None)
    engine = Engine(lambda _: merger, [make_filter(f) if isinstance(f, str) else f for f in filters], statistics, seed)
    engine.check(found.merged, len(named), base is not None, len(statistics))
    engine.check_statistics(found.merged)

    def load(name: str) -> tuple[Tensor | None, Tensor]:
        to = compute_dtype(s[name].dtype for _, s in models)
        W = [s[name].detach().reshape(s[name].shape or (1,)).to("cpu", to) for _, s in models]
        for w, (label, _) in zip(W, models, strict=True):
            check_finite(w, name, label)
        return (W[0].clone(), torch.stack(W[1:])) if base is not None else (None, torch.stack(W))

    engine.survey(found.merged, load)
    return _merged(engine, models, found.merged, load, out, progress)


@torch.no_grad()
def _merged(
    engine: Engine,
    models: Sequence[tuple[str, State]],
    names: Sequence[str],
    load: Callable[[str], tuple[Tensor | None, Tensor]],
    dtype: torch.dtype | None,
    progress: Callable[[str], None] | None,
) -> dict[str, Tensor]:
    reference = models[0][1]
    merging = set(names)
    result: dict[str, Tensor] = {}
    tied: dict[Any, str] = {}
    for name, like in reference.items():
        if name not in merging:
            result[name] = like.detach().clone()
            continue
        storage = tuple((s[name].data_ptr(), s[name].shape, s[name].stride()) for _, s in models)
        if storage in tied and like.numel():
            result[name] = result[tied[storage]]
        else:
            merged = written_as(engine.merge(name, *load(name)), dtype or like.dtype, name)
            result[name] = merged.reshape(like.shape).to(like.device)
            tied[storage] = name
        if progress is not None:
            progress(name)
    return result


def specs(state: State, label: str) -> dict[str, Spec]:
    """Shapes and dtypes of a state dict.

    Raises:
        InputError: something in it is not a tensor.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} of {label} is a {type(value).__name__}, not a tensor")
    return {n: Spec(tuple(v.shape), v.dtype) for n, v in state.items()}

"""Merging state dicts that are in memory already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import yaml

from polytask.errors import InputError
from polytask.merging.base import TURNED, Filter, Merger
from polytask.merging.engine import Engine, check_finite, written_as
from polytask.merging.matching import Spec, compute_dtype, match, result_dtype, spec_of, torch_dtype
from polytask.registry import Method, find, known

if TYPE_CHECKING:
    from torch import Tensor, nn

State: TypeAlias = "Mapping[str, Tensor]"

WHOLE = {
    "inputs": "runs the model on inputs while it merges: give them both to polytask.merging.merge",
    "statistics": "keeps experts in one model: polytask.merging.route_by_prototypes makes it, and polytask merge",
    "base": "keeps experts in one model: polytask.merging.route_by_subspaces makes it, and polytask merge",
}
"""What is to be said of methods that do not go tensor by tensor, by what they need."""


def make(name: str, **options: Any) -> Merger:
    """Build a merging method by its registered name or an alias.

    Args:
        name: see ``polytask methods --family merging``.
        options: the method's own.

    Raises:
        InputError: unknown name or option; the message names the nearest ones. A method that does not go tensor by tensor.
    """
    entry = merging_method(name)
    if not (isinstance(entry.factory, type) and issubclass(entry.factory, Merger)):
        raise InputError(f"{entry.name} {WHOLE[entry.needs]}")
    merger: Merger = built(entry, options)
    return merger


def merging_method(name: str) -> Method:
    """The registered merging method of a name or an alias.

    Raises:
        InputError: no such method; the message names the nearest ones, or says that it is a filter.
    """
    label = name.replace("++", "_pp") if isinstance(name, str) else name
    try:
        return find(label, family="merging")
    except InputError:
        other = known(label, "filter") if isinstance(label, str) else None
        if other is None:
            raise
        instead = "it is a filter of task vectors, which goes before one (--filter, or filters=[...])"
        raise InputError(f"{other.name} is no merging method: {instead}") from None


def make_filter(name: str, **options: Any) -> Filter:
    """Build a filter of task vectors by its registered name or an alias.

    Args:
        name: see ``polytask methods --family filter``; options may follow in the same text, as in ``"trim:density=0.1,scope=model"``.
        options: the filter's own.

    Raises:
        InputError: unknown name or option.
    """
    if not isinstance(name, str):
        raise InputError(f"a filter is given by its name, or made by make_filter, not {name!r}")
    name, sign, text = name.partition(":")
    for setting in text.split(",") if sign else ():
        option, equals, value = setting.partition("=")
        if not (option and equals and value):
            raise InputError(f"options of a filter are written {name}:OPTION=VALUE,OPTION=VALUE, not {name}:{text}")
        try:
            options[option] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"options of a filter are written {name}:OPTION=VALUE,OPTION=VALUE, not {name}:{text}"
            ) from None
    found: Filter = built(find(name, family="filter"), options)
    return found


def built(method: Method, options: Mapping[str, Any]) -> Any:
    """A method with its options.

    Raises:
        InputError: one that it has not, or of another kind.
    """
    unknown = [o for o in options if o not in method.options]
    if unknown:
        raise InputError(f"{method.name} has no option {unknown[0]!r}; it takes {', '.join(method.options) or 'none'}")
    return method.factory(**{o: _of_kind(v, method.options[o], f"{o} of {method.name}") for o, v in options.items()})


def _of_kind(value: Any, default: Any, label: str) -> Any:
    """A value for an option whose default is a flag or a count; 1 and 1.0 count as true, as mergekit's files have it.

    Numbers written as YAML does not read them, 1e-5, come as texts.
    """
    if hasattr(value, "tolist"):  # NumPy's and PyTorch's numbers and arrays
        value = value.tolist()
    if isinstance(value, list):
        return [_of_kind(v, default, label) for v in value]
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(default, bool):
        if value not in (False, True):
            raise InputError(f"{label} is true or false, not {value!r}")
        return bool(value)
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise InputError(f"{label} is a whole number, not {value!r}")
        return int(value)
    return value


def merge(
    base: State | None,
    experts: Sequence[State] | Mapping[str, State],
    method: str = "task_arithmetic",
    *,
    filters: Filter | str | Sequence[Filter | str] = (),
    skip: str | Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    statistics: Sequence[Mapping[str, Tensor]] = (),
    model: nn.Module | None = None,
    inputs: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]] | None = None,
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
        model: the architecture, for methods that run it; it is left as it was. Those that need statistics gather them when it is given.
        inputs: what it is run on: for each expert a few batches of its task, by name or in order; a tuple is unpacked into positional
            arguments, a dict into named ones. Methods that learn from labels take pairs of inputs and labels; see
            :func:`~polytask.merging.adapt`.
        seed: of all random draws.
        progress: called with the name of each tensor when it is done.
        options: the method's own; what may differ between experts, such as weights, in a sequence or by the experts' names. Methods with
            masks give the model of one expert, ``expert="cars"``.

    Returns:
        The merged state dict, with the tensors of the base (of the first expert where there is no base, of the one whose model it is with
        masks), in their order.

    Raises:
        InputError: models that do not fit together, NaN in a tensor, an unknown method or option, inputs that are missing or not used.

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> merge(base, [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}], "task_arithmetic", scale=0.5)
        {'w': tensor([0.5000, 1.0000])}
    """
    named = dict(experts) if isinstance(experts, Mapping) else {f"expert {i}": s for i, s in enumerate(experts, 1)}
    if not named:
        raise InputError("there is nothing to merge: no expert was given")
    entry, options = merging_method(method), for_experts(options, list(named))
    batches = by_expert(inputs, list(named))
    if entry.needs == "inputs":
        return _run(entry, base, named, model, batches, filters, skip, dtype, seed, options)
    merger = make(method, **options)
    if batches:
        if merger.statistic is None or statistics or model is None:
            why = (
                "uses no inputs"
                if merger.statistic is None
                else "takes statistics, or a model and inputs to gather them"
            )
            raise InputError(f"{entry.name} {why}")
        from polytask.merging.statistics import gather, holding

        statistics = [gather(merger.statistic, holding(model, s), batches[n]) for n, s in named.items()]
    models = ([("the base", base)] if base is not None else []) + list(named.items())
    out = None if dtype is None else torch_dtype(result_dtype(dtype))
    described = [(label, specs(s, label)) for label, s in models]
    found = match(described, skip, mixed_dtypes=out is not None)
    chosen = [filters] if isinstance(filters, str | Filter) else filters
    engine = Engine(
        lambda _: merger, [f if isinstance(f, Filter) else make_filter(f) for f in chosen], statistics, seed
    )
    engine.check(found.merged, len(named), base is not None, len(statistics))
    engine.check_statistics(found.merged)
    if merger.statistic is not None:
        wanted = {n: described[0][1][n] for n in found.merged}
        check_statistics(statistics, merger.statistic, wanted, list(named))

    def load(name: str) -> tuple[Tensor | None, Tensor]:
        to = torch_dtype(compute_dtype(own[name].dtype for _, own in described))
        W = [s[name].detach().reshape(s[name].shape or (1,)).to("cpu", to).contiguous() for _, s in models]
        for w, (label, _) in zip(W, models, strict=True):
            check_finite(w, name, label)
        return (W[0].clone(), torch.stack(W[1:])) if base is not None else (None, torch.stack(W))

    engine.survey(found.merged, load)
    return _merged(
        engine,
        models,
        models[0 if merger.keeps is None else merger.keeps - len(named)][1],
        found.merged,
        load,
        out,
        progress,
    )


def for_experts(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Options with what they say of experts by name put in the experts' order.

    Raises:
        InputError: there is no expert of a name.
    """
    found = {
        o: [v[n] for n in names] if isinstance(v, Mapping) and v.keys() == set(names) else v for o, v in options.items()
    }
    if isinstance(found.get("expert"), str):
        if found["expert"] not in names:
            raise InputError(f"there is no expert {found['expert']!r}; there are {', '.join(names)}")
        found["expert"] = names.index(found["expert"])
    return found


def by_expert(
    inputs: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]] | None, names: Sequence[str]
) -> dict[str, Sequence[Any]]:
    """Batches by the experts' names, none where there are none.

    Raises:
        InputError: they are not of these experts.
    """
    if inputs is None:
        return {}
    found = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
    if set(found) != set(names) or len(inputs) != len(names):
        raise InputError(f"inputs are of {', '.join(found) or 'no task'}; the experts are {', '.join(names)}")
    empty = [n for n, batches in found.items() if not len(batches)]
    if empty:
        raise InputError(f"there is no batch of inputs for {empty[0]}")
    return found


def _run(
    entry: Method,
    base: State | None,
    experts: Mapping[str, State],
    model: nn.Module | None,
    batches: Mapping[str, Sequence[Any]],
    filters: Filter | str | Sequence[Filter | str],
    skip: str | Sequence[str],
    dtype: torch.dtype | str | None,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Merge by a method that runs the model."""
    from polytask.merging.adaptive import adapt

    if base is None:
        raise InputError(f"{entry.name} merges task vectors: it needs the base that the experts started from")
    if model is None or not batches:
        raise InputError(
            f"{entry.name} runs the model while it merges: give model= and inputs=, some batches of each expert's task"
        )
    return adapt(
        model, base, experts, batches, entry.name, skip=skip, filters=filters, dtype=dtype, seed=seed, **options
    )


def _merged(
    engine: Engine,
    models: Sequence[tuple[str, State]],
    reference: State,
    names: Sequence[str],
    load: Callable[[str], tuple[Tensor | None, Tensor]],
    dtype: torch.dtype | None,
    progress: Callable[[str], None] | None,
) -> dict[str, Tensor]:
    merging = set(names)
    result: dict[str, Tensor] = {}
    tied: dict[Any, str] = {}
    for name, like in reference.items():
        if name not in merging:
            result[name] = like.detach().clone(memory_format=torch.contiguous_format)
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
        InputError: it is no state dict, or something in it is not a tensor with values.
    """
    if not isinstance(state, Mapping):
        instead = ": give its state_dict()" if isinstance(state, torch.nn.Module) else ""
        raise InputError(f"{label} is a {type(state).__name__}, not a state dict of tensors by name{instead}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} of {label} is a {type(value).__name__}, not a tensor")
        if value.is_meta or value.layout is not torch.strided:
            kind = "on the meta device" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise InputError(f"the tensor {name} of {label} is {kind}: only dense tensors with values are merged")
    return {n: spec_of(v) for n, v in state.items()}


def check_statistics(
    statistics: Sequence[Mapping[str, Tensor]], kind: str, wanted: Mapping[str, Spec], labels: Sequence[str]
) -> None:
    """Refuse statistics of another model, or of inputs that were no numbers.

    Args:
        statistics: of each expert.
        kind: ``gramian`` or ``fisher``.
        wanted: the tensors that they are statistics of.
        labels: what the experts are called.

    Raises:
        InputError: one has another shape than its tensor asks for, or holds NaN.
    """
    for label, own in zip(labels, statistics, strict=True):
        for stored, S in own.items():
            name, inputs = stored.removesuffix(TURNED), 0 if stored.endswith(TURNED) else 1
            if name not in wanted or (kind == "gramian" and len(wanted[name].shape) != 2):
                continue
            shape = wanted[name].shape if kind == "fisher" else (wanted[name].shape[inputs] + 1,) * 2
            if tuple(S.shape) != shape:
                raise InputError(
                    f"the {kind} of {name} of {label} has shape {list(S.shape)}, and its tensor asks for {list(shape)}"
                )
            check_finite(S, f"{name} in the {kind}s", label)

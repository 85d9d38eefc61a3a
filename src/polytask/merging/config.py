"""mergekit's configuration files, read with mergekit's meaning: models, parameters, gradients over layers, filters on names."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.errors import InputError, StorageError
from polytask.merging.adapter import open_expert
from polytask.merging.checkpoint import Checkpoint
from polytask.merging.hub import on_hub
from polytask.merging.in_memory import merging_method
from polytask.merging.on_disk import MergePlan, plan_of
from polytask.merging.proxy import Proxy
from polytask.merging.stacked import LAYER, Piece, Stack, StackedPlan, layers_of
from polytask.registry import Method

KNOWN = (
    "models",
    "slices",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "filters",
    "skip",
    "seed",
)
RENAMED = {
    "weight": "weights",
    "lambda": "scale",
    "select_topk": "select",
    "filter_wise": "per_row",
    "max_iter": "steps",
    "tol": "tolerance",
    "normalize_weights": "normalize",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
}
WITHOUT_MEANING = ("int8_mask", "eps")
"""Parameters that save mergekit memory or keep it from dividing by zero, and change no result."""

IDLE = ("normalize", "rescale")
"""Parameters that files often set whatever their method; mergekit passes over them where there is nothing to normalize or rescale."""

IDLE_IN = (
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
    "passthrough",
)
"""The methods where there is nothing."""

DEFAULTS = {"density": 1.0, "scale": 1.0, "select": 1.0, "gamma": 0.01}
"""What mergekit takes where a file says nothing and our own default, the paper's, is another."""

OF_METHODS = {
    "karcher": {"steps": 10, "tolerance": 1e-5},
    "della": {"epsilon": 0.3},
    "della_linear": {"epsilon": 0.3},
}
"""The same for single methods."""

WIDTHS = {"della": "epsilon", "della_linear": "epsilon"}
"""Options that are half as wide in mergekit: it says +- epsilon, the paper says the whole range."""

WITH_BASE = ("weighted", "karcher", "passthrough")
"""Methods to which mergekit's ``base_model`` is one more model to be merged."""

BY_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
"""Parameters that may differ between models."""

ENTRY = {"models": ("model", "parameters"), "sources": ("model", "parameters", "layer_range")}
SLICE = ("parameters", "base_model")


def read_config(file: Path, proxy: Proxy | None = None, *, headers_only: bool = False) -> MergePlan:
    """The plan that a YAML file describes.

    Args:
        file: paths in it are relative to its folder; what is not there may be a name on the hub.
        proxy: what statistics are gathered from, for methods that need them.
        headers_only: of models on the hub fetch no weights.

    Raises:
        InputError: not YAML, a key or a parameter that is not known, models that do not fit together.
        StorageError: a file is missing or cut short.
    """
    import yaml

    if not file.exists():
        raise StorageError(f"there is no configuration at {file}")
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{file} is not a YAML file") from None
    if not isinstance(said, dict) or "merge_method" not in said:
        raise InputError(f"{file} is no configuration of a merge: it names no merge_method")
    unknown = [k for k in said if k not in KNOWN]
    if unknown:
        raise InputError(f"{file} says {unknown[0]!r}, which is not known; known are {', '.join(KNOWN)}")
    return _plan(said, file, proxy, headers_only)


def _plan(said: Mapping[str, Any], file: Path, proxy: Proxy | None, headers_only: bool) -> MergePlan:
    method = merging_method(said["merge_method"])
    slices = _slices(said, file)
    base = slices[0].get("base_model", said.get("base_model"))
    base_place = None if base is None else _place(base, file)
    models = _Opened(base_place, headers_only)
    if len(slices) > 1 or any("layer_range" in m and not _is_whole(m, models, file) for m in slices[0]["sources"]):
        return _stacked(method, said, slices, models, file, proxy)
    listed = slices[0]["sources"]
    places = [_place(m["model"], file) for m in listed]
    chosen = [
        (p, m) for p, m in zip(places, listed, strict=True) if base_place is None or p.resolve() != base_place.resolve()
    ]
    if base_place is not None and method.name in WITH_BASE:
        # configuration and tokenizer are those of the first
        chosen = [(base_place, _entry_of(base_place, places, listed)), *chosen]
    experts = [p for p, _ in chosen]
    if not experts:
        raise InputError(f"{file} lists no model but the base: there is nothing to merge")
    layers = layers_of(models[base_place or experts[0]].specs)
    settings = [_parameters(m, file) for _, m in chosen]
    common = [_parameters(s, file) for s in (slices[0], said)]
    fixed = {"around_base": True} if base is not None and "around_base" in method.options else {}

    def options(name: str) -> dict[str, Any]:
        sources = [(name, s) for s in settings]
        return _options(method, name, sources, common, depth_of(name, layers), file) | fixed

    return plan_of(method.name)(
        experts,
        None if method.name in WITH_BASE else base_place,
        method.name,
        options,
        proxy=proxy,
        headers_only=headers_only,
        **_of_all(said, file),
    )


def _of_all(said: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a file says of the whole merge."""
    return {
        "filters": _several(said, "filters", file),
        "skip": _several(said, "skip", file),
        "dtype": said.get("out_dtype") or said.get("dtype"),
        "seed": _seed(said, file),
        "tokenizer": _tokenizer(said, file),
    }


def _stacked(
    method: Method,
    said: Mapping[str, Any],
    slices: Sequence[Mapping[str, Any]],
    models: _Opened,
    file: Path,
    proxy: Proxy | None,
) -> StackedPlan:
    """A plan of a model whose layers are put together from slices."""
    if method.needs in ("statistics", "inputs") or proxy is not None:
        raise InputError(f"{method.name} looks at data with whole models: {file} takes their layers apart")
    pieces, settings = [], []
    for s in slices:
        entries = [(_place(m["model"], file), _range(m, models, file), _parameters(m, file)) for m in s["sources"]]
        base = s.get("base_model", said.get("base_model"))
        centre = None if base is None or method.name in WITH_BASE else _place(base, file)
        lengths = sorted({stop - start for _, (start, stop), _ in entries})
        if len(lengths) > 1:
            raise InputError(f"a slice of {file} takes {lengths[0]} layers of one model and {lengths[1]} of another")
        if centre is not None:
            # a base that the slice does not name has the range of the first model
            unnamed = {"model": base, "layer_range": list(entries[0][1])}
            named = [e for e in entries if e[0].resolve() == centre.resolve()]
            others = [e for e in entries if e[0].resolve() != centre.resolve()]
            entries = [*(named[:1] or [(centre, _range(unnamed, models, file), {})]), *others]
        where, ranges, own = zip(*entries, strict=True)
        pieces.append(Piece(where, tuple(start for start, _ in ranges), lengths[0], centre is not None))
        settings.append((own[centre is not None :], [_parameters(s, file), _parameters(said, file)]))
    given = said.get("base_model")
    donor = pieces[0].models[0] if given is None else _place(given, file)
    stack = Stack(pieces, {p: models[p] for p in (donor, *(m for piece in pieces for m in piece.models))}, donor)

    def options(name: str) -> dict[str, Any]:
        origin = stack.origins[name]
        own, common = settings[origin.piece]
        names = [n for _, n in origin.sources[origin.has_base :]]
        found = _options(method, name, list(zip(names, own, strict=True)), common, origin.t, file)
        return found | ({"around_base": True} if origin.has_base and "around_base" in method.options else {})

    experts = list(stack.models)
    return StackedPlan(experts, None, method.name, options, stack=stack, **_of_all(said, file))


class _Opened(dict[Path, Checkpoint]):
    """Models that a file names, opened when they are asked for."""

    def __init__(self, base: Path | None, headers_only: bool) -> None:
        super().__init__()
        self.base, self.headers_only = base, headers_only

    def __missing__(self, place: Path) -> Checkpoint:
        base = None if self.base in (None, place) else self[self.base]  # type: ignore[index]
        self[place] = open_expert(place, base, headers_only=self.headers_only)
        return self[place]


def _is_whole(source: Mapping[str, Any], models: _Opened, file: Path) -> bool:
    deepest = max(layers_of(models[_place(source["model"], file)].specs).values(), default=0)
    return bool(source["layer_range"] == [0, deepest])


def _range(source: Mapping[str, Any], models: _Opened, file: Path) -> tuple[int, int]:
    """The layers of a model that a slice takes, from the first to the one after the last."""
    found = source.get("layer_range")
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int for n in found):
        raise InputError(
            f"{file} takes layers {found} of {source['model']}: of each model a slice takes a layer_range, [FIRST, END]"
        )
    start, stop = found
    depth = max(layers_of(models[_place(source["model"], file)].specs).values(), default=0)
    if not 0 <= start < stop <= depth:
        raise InputError(
            f"{file} takes layers {found} of {source['model']}, which has {depth}: a layer_range is written [FIRST, END], from 0 on and "
            "without the END itself"
        )
    return start, stop


def _entry_of(base: Path, places: Sequence[Path], listed: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a file says of its base as a model to be merged."""
    return next((m for p, m in zip(places, listed, strict=True) if p.resolve() == base.resolve()), {})


def _parameters(said: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    found = said.get("parameters") or {}
    if not isinstance(found, dict):
        raise InputError(f"{file} gives parameters as {found!r}, not by their names")
    return found


def _several(said: Mapping[str, Any], key: str, file: Path) -> tuple[str, ...]:
    found = said.get(key) or ()
    found = (found,) if isinstance(found, str) else found
    if not isinstance(found, list | tuple) or not all(isinstance(f, str) for f in found):
        raise InputError(f"{key} in {file} is a list of texts, not {found!r}")
    return tuple(found)


def _seed(said: Mapping[str, Any], file: Path) -> int:
    found = said.get("seed") or 0
    if not isinstance(found, int):
        raise InputError(f"the seed in {file} is a whole number, not {found!r}")
    return found


def _tokenizer(said: Mapping[str, Any], file: Path) -> Path | None:
    """The model whose tokenizer is taken, None for the base's."""
    source = said.get("tokenizer_source")
    if "tokenizer" in said:
        own = said["tokenizer"]
        if source is not None or not isinstance(own, dict) or set(own) != {"source"}:
            raise InputError(
                f"{file} asks for a tokenizer to be put together: only one model's can be taken, by its source"
            )
        source = own["source"]
    if source == "union":
        raise InputError(
            f"{file} asks for the union of the tokenizers: only base, or the path of one model, can be taken"
        )
    return None if source in (None, "base") else _place(source, file)


def _slices(said: Mapping[str, Any], file: Path) -> list[Mapping[str, Any]]:
    """The slices that a file names; models that are merged whole are the sources of one."""
    slices = said.get("slices")
    if (slices is None) == (said.get("models") is None):
        raise InputError(f"{file} names either models or slices")
    where = "models" if slices is None else "sources"
    if slices is None:
        slices = [{"sources": said["models"]}]
    if not isinstance(slices, list) or not slices or not all(isinstance(s, dict) for s in slices):
        raise InputError(f"slices in {file} are not a list of slices, each with its sources")
    for s in slices:
        listed = s.get("sources")
        if not isinstance(listed, list):
            raise InputError(f"{where} in {file} are not a list of models")
        wrong = [m for m in listed if not isinstance(m, dict) or not isinstance(m.get("model"), str)]
        if wrong or (not listed and where == "sources"):
            raise InputError(f"an entry of {file} names no model: {wrong[0] if wrong else s!r}")
        of_slice = {k: v for k, v in s.items() if k != "sources"}
        for m, known in (*((m, ENTRY[where]) for m in listed), (of_slice, SLICE)):
            unknown = [k for k in m if k not in known]
            if unknown:
                raise InputError(
                    f"{file} says {unknown[0]!r} of a model, not among its parameters: known are {', '.join(known)}"
                )
    return slices


def _place(name: str, file: Path) -> Path:
    if not isinstance(name, str):
        raise InputError(f"{file} names a model by {name!r}, not by a path")
    place = Path(name).expanduser()
    place = place if place.is_absolute() else file.parent / place
    model, plus, adapter = name.rpartition("+")
    if plus and model and not place.exists():  # as mergekit writes an adapter of a model
        return Path(f"{_place(model, file)}+{_place(adapter, file)}")
    if not place.exists() and not on_hub(Path(name)):
        raise StorageError(f"there is no model at {place}, which {file} names")
    return place if place.exists() else Path(name)


def depth_of(name: str, layers: Mapping[str, int]) -> float:
    """Where between the first layer (0) and the last (1) a tensor stands; those outside the layers stand at 0, as mergekit has it."""
    found = LAYER.match(name)
    if not found:
        return 0.0
    last = layers[found[1] or ""] - 1
    return int(found[2]) / last if last else 1.0


def evaluate(setting: Any, name: str, t: float) -> Any:
    """The value of a parameter for one tensor.

    Args:
        setting: a value, a list of numbers (a gradient over the layers), or a list of ``{filter, value}``.
        name: the tensor's.
        t: its depth, from 0 to 1.

    Returns:
        The value, None where no filter fits.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and isinstance(setting[0], dict):
        for case in setting:
            if not isinstance(case, dict) or "value" not in case:
                raise InputError(f"a case of a parameter is written with filter and value, not as {case!r}")
            if case.get("filter") in (None, "*") or str(case["filter"]) in name:
                return evaluate(case["value"], name, t)
        return None
    numbers = [_number(v) for v in setting]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        i = min(int(t * (len(numbers) - 1)), max(len(numbers) - 2, 0))
        low, high = numbers[i], numbers[min(i + 1, len(numbers) - 1)]
        return low + (t * (len(numbers) - 1) - i) * (high - low)
    return setting[int(t * (len(setting) - 1))]


def _number(value: Any) -> Any:
    """A number that YAML reads as a text, 1e-4, as a number."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _options(
    method: Method,
    name: str,
    sources: Sequence[tuple[str, Mapping[str, Any]]],
    common: Sequence[Mapping[str, Any]],
    t: float,
    file: Path,
) -> dict[str, Any]:
    """The method's options at a tensor.

    Args:
        method: it.
        name: the tensor's.
        sources: what each model calls the tensor, and the parameters that are given for that model.
        common: parameters of the slice and of all.
        t: where along the layers the tensor stands.
        file: the configuration.
    """
    defaults = {n: v for n, v in DEFAULTS.items() if n in method.options} | OF_METHODS.get(method.name, {})
    options: dict[str, Any] = dict(defaults)
    passed_over = {*WITHOUT_MEANING, *(IDLE if method.name in IDLE_IN else ())}
    for said in sorted({n for s in (*(own for _, own in sources), *common) for n in s} - passed_over):
        option = RENAMED.get(said, said)
        if option not in method.options:
            raise InputError(
                f"{file} sets {said!r}, which {method.name} does not take; it takes {', '.join(method.options)}"
            )
        values = []
        for own_name, own in sources:
            # filters go by what the model calls the tensor, where the parameter may differ between models
            known_as = own_name if said in BY_MODEL else name
            found = (evaluate(s.get(said), known_as, t) for s in (own, *common))
            values.append(next((v for v in found if v is not None), None))
        if all(v is None for v in values):
            continue
        if any(v is None for v in values) and option not in defaults:
            raise InputError(f"{file} sets {said!r} for some models only, not for all of them, at the tensor {name}")
        wide = 2 if option == WIDTHS.get(method.name) else 1
        values = [defaults[option] if v is None else v * wide if wide > 1 else v for v in values]
        options[option] = values if any(v != values[0] for v in values) else values[0]
    return options

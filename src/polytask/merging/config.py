"""mergekit's configuration files, read with mergekit's meaning: models, parameters, gradients over layers, filters on names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polytask.errors import InputError, StorageError
from polytask.merging.adapter import open_expert
from polytask.merging.hub import on_hub
from polytask.merging.in_memory import merging_method
from polytask.merging.on_disk import MergePlan, plan_of
from polytask.merging.proxy import Proxy
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

WITH_BASE = ("weighted", "karcher")
"""Methods to which mergekit's ``base_model`` is one more model to be merged."""

ENTRY = {"models": ("model", "parameters"), "sources": ("model", "parameters", "layer_range")}
LAYER = re.compile(r"^(.*?\.)?(\d+)\.")


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
    listed = _models(said, file)
    base = said.get("base_model")
    places = [_place(m["model"], file) for m in listed]
    base_place = None if base is None else _place(base, file)
    chosen = [
        (p, m) for p, m in zip(places, listed, strict=True) if base_place is None or p.resolve() != base_place.resolve()
    ]
    if base_place is not None and method.name in WITH_BASE:
        # configuration and tokenizer are those of the first
        chosen = [(base_place, _entry_of(base_place, places, listed)), *chosen]
    experts = [p for p, _ in chosen]
    if not experts:
        raise InputError(f"{file} lists no model but the base: there is nothing to merge")
    layers = _layers(open_expert(base_place or experts[0], None, headers_only=headers_only).specs)
    _check_slices(said, layers, file)
    settings = [_parameters(m, file) for _, m in chosen]
    common = [_parameters(s, file) for s in ((said.get("slices") or [{}])[0], said)]
    parameters = {n for s in (*settings, *common) for n in s} - set(WITHOUT_MEANING)
    fixed = {"around_base": True} if base is not None and "around_base" in method.options else {}
    options = partial(_options, method, parameters, settings, common, fixed, layers, file)
    return plan_of(method.name)(
        experts,
        None if method.name in WITH_BASE else base_place,
        method.name,
        options,
        _several(said, "filters", file),
        _several(said, "skip", file),
        said.get("out_dtype") or said.get("dtype"),
        _seed(said, file),
        _tokenizer(said, file),
        proxy=proxy,
        headers_only=headers_only,
    )


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


def _models(said: Mapping[str, Any], file: Path) -> list[Mapping[str, Any]]:
    slices = said.get("slices")
    if (slices is None) == (said.get("models") is None):
        raise InputError(f"{file} names either models or slices")
    whole = isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict) and "sources" in slices[0]
    if slices is not None and not whole:
        raise InputError(f"{file} puts several slices of layers together: only one, of all layers, can be merged")
    where = "models" if slices is None else "sources"
    listed = said["models"] if slices is None else slices[0]["sources"]
    if not isinstance(listed, list):
        raise InputError(f"{where} in {file} are not a list of models")
    wrong = [m for m in listed if not isinstance(m, dict) or not isinstance(m.get("model"), str)]
    if wrong:
        raise InputError(f"an entry of {file} names no model: {wrong[0]!r}")
    for m in [*listed, *({k: v for k, v in s.items() if k != "sources"} for s in slices or ())]:
        known = (*ENTRY[where], *(("base_model",) if "model" not in m else ()))
        unknown = [k for k in m if k not in known]
        if unknown:
            raise InputError(
                f"{file} says {unknown[0]!r} of a model, not among its parameters: known are {', '.join(known)}"
            )
    return list(listed)


def _check_slices(said: Mapping[str, Any], layers: Mapping[str, int], file: Path) -> None:
    deepest = max(layers.values(), default=0)
    for source in (said["slices"][0]["sources"]) if said.get("slices") else ():
        if "layer_range" in source and list(source["layer_range"]) != [0, deepest]:
            raise InputError(
                f"{file} takes layers {source['layer_range']} of {source['model']}, which has {deepest}: only whole models merge"
            )


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


def _layers(names: Any) -> dict[str, int]:
    """How many layers each stack has, by what stands before the layer's number in the names."""
    depth: dict[str, int] = {}
    for name in names:
        found = LAYER.match(name)
        if found:
            depth[found[1] or ""] = max(depth.get(found[1] or "", 0), int(found[2]) + 1)
    return depth


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
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in setting):
        i = min(int(t * (len(setting) - 1)), max(len(setting) - 2, 0))
        low, high = setting[i], setting[min(i + 1, len(setting) - 1)]
        return low + (t * (len(setting) - 1) - i) * (high - low)
    return setting[int(t * (len(setting) - 1))]


def _options(
    method: Method,
    parameters: set[str],
    settings: Sequence[Mapping[str, Any]],
    common: Sequence[Mapping[str, Any]],
    fixed: Mapping[str, Any],
    layers: Mapping[str, int],
    file: Path,
    name: str,
) -> dict[str, Any]:
    t = depth_of(name, layers)
    defaults = {n: v for n, v in DEFAULTS.items() if n in method.options} | OF_METHODS.get(method.name, {})
    options: dict[str, Any] = {**defaults, **fixed}
    for said in sorted(parameters):
        option = RENAMED.get(said, said)
        if option not in method.options:
            raise InputError(
                f"{file} sets {said!r}, which {method.name} does not take; it takes {', '.join(method.options)}"
            )
        found = [evaluate(s.get(said), name, t) for s in settings]
        shared = next((v for c in common if (v := evaluate(c.get(said), name, t)) is not None), None)
        values = [shared if v is None else v for v in found]
        if all(v is None for v in values):
            continue
        if any(v is None for v in values) and option not in defaults:
            raise InputError(f"{file} sets {said!r} for some models only, not for all of them, at the tensor {name}")
        wide = 2 if option == WIDTHS.get(method.name) else 1
        values = [defaults[option] if v is None else v * wide if wide > 1 else v for v in values]
        options[option] = values if any(v != values[0] for v in values) else values[0]
    return options

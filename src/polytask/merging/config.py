"""mergekit's configuration files, read with mergekit's meaning: models, parameters, gradients over layers, filters on names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polytask.errors import InputError, StorageError
from polytask.merging.adapter import open_expert
from polytask.merging.on_disk import MergePlan
from polytask.merging.proxy import Proxy
from polytask.registry import Method, find

KNOWN = (
    "models",
    "slices",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
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
}
WITHOUT_MEANING = ("int8_mask",)
"""Parameters that save mergekit memory and change no result."""

DEFAULTS = {"density": 1.0, "scale": 1.0, "select": 1.0, "gamma": 0.01}
"""What mergekit takes where a file says nothing and our own default, the paper's, is another."""

WIDTHS = ("epsilon",)
"""Options that are half as wide in mergekit: it says +- epsilon, the paper says the whole range."""

FIRST = ("embed", "wte", "wpe", "patch")
LAYER = re.compile(r"^(.*?\.)?(\d+)\.")


def read_config(file: Path, proxy: Proxy | None = None) -> MergePlan:
    """The plan that a YAML file describes.

    Args:
        file: paths in it are relative to its folder.
        proxy: what statistics are gathered from, for methods that need them.

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
    return _plan(said, file, proxy)


def _plan(said: Mapping[str, Any], file: Path, proxy: Proxy | None) -> MergePlan:
    method = find(str(said["merge_method"]), family="merging")
    listed = _models(said, file)
    base = said.get("base_model")
    places = [_place(m["model"], file) for m in listed]
    base_place = None if base is None else _place(base, file)
    chosen = [(p, m) for p, m in zip(places, listed, strict=True) if p != base_place]
    experts = [p for p, _ in chosen]
    layers = _layers(open_expert(base_place or experts[0], None).specs)
    _check_slices(said, layers, file)
    settings = [m.get("parameters") or {} for _, m in chosen]
    common = said.get("parameters") or {}
    parameters = {n for s in (*settings, common) for n in s} - set(WITHOUT_MEANING)
    options = partial(_options, method, parameters, settings, common, layers, file)
    tokenizer = said.get("tokenizer_source") or "base"
    if tokenizer == "union":
        raise InputError(
            f"{file} asks for the union of the tokenizers: only base, or the path of one model, can be taken"
        )
    return MergePlan(
        experts,
        base_place,
        method.name,
        options,
        tuple(said.get("filters") or ()),
        tuple(said.get("skip") or ()),
        said.get("out_dtype") or said.get("dtype"),
        int(said.get("seed") or 0),
        None if tokenizer == "base" else _place(tokenizer, file),
        proxy=proxy,
    )


def _models(said: Mapping[str, Any], file: Path) -> list[Mapping[str, Any]]:
    slices = said.get("slices")
    if (slices is None) == (said.get("models") is None):
        raise InputError(f"{file} names either models or slices")
    if slices is not None and (len(slices) != 1 or "sources" not in slices[0]):
        raise InputError(
            f"{file} puts {len(slices)} slices of layers together, which changes the architecture: only one can be merged"
        )
    listed = said["models"] if slices is None else slices[0]["sources"]
    wrong = [m for m in listed if not isinstance(m, dict) or not isinstance(m.get("model"), str)]
    if wrong:
        raise InputError(f"an entry of {file} names no model: {wrong[0]!r}")
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
    if not place.exists():
        raise StorageError(
            f"there is no model at {place}, which {file} names; models are taken from the disk, never fetched"
        )
    return place


def _layers(names: Any) -> dict[str, int]:
    """How many layers each stack has, by what stands before the layer's number in the names."""
    depth: dict[str, int] = {}
    for name in names:
        found = LAYER.match(name)
        if found:
            depth[found[1] or ""] = max(depth.get(found[1] or "", 0), int(found[2]) + 1)
    return depth


def depth_of(name: str, layers: Mapping[str, int]) -> float:
    """Where between the first layer (0) and the last (1) a tensor stands; embeddings stand at 0, what follows the layers at 1."""
    found = LAYER.match(name)
    if found:
        last = layers[found[1] or ""] - 1
        return int(found[2]) / last if last else 1.0
    return 0.0 if any(part in name for part in FIRST) else 1.0


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
            if case.get("filter") in (None, "*") or case["filter"] in name:
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
    common: Mapping[str, Any],
    layers: Mapping[str, int],
    file: Path,
    name: str,
) -> dict[str, Any]:
    t = depth_of(name, layers)
    options: dict[str, Any] = {n: v for n, v in DEFAULTS.items() if n in method.options}
    for said in sorted(parameters):
        option = RENAMED.get(said, said)
        if option not in method.options:
            raise InputError(
                f"{file} sets {said!r}, which {method.name} does not take; it takes {', '.join(method.options)}"
            )
        found = [evaluate(s.get(said), name, t) for s in settings]
        shared = evaluate(common.get(said), name, t)
        values = [shared if v is None else v for v in found]
        if any(v is None for v in values):
            if any(v is not None for v in values):
                raise InputError(
                    f"{file} sets {said!r} for some models only, not for all of them, at the tensor {name}"
                )
            continue
        values = [2 * v for v in values] if option in WIDTHS else values
        options[option] = values if any(v != values[0] for v in values) else values[0]
    return options

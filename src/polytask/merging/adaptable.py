"""What of a model an adapter can change: matrices of linear layers at a low rank, norms and biases whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polytask.merging.matching import Spec
from polytask.merging.proxy import CONFIG

EMBEDDING = re.compile(r"emb|wte|wpe|shared|relative_attention_bias")
"""In names of matrices that are tables of rows, where no architecture tells."""

LINEAR, TURNED, OTHER = "linear", "turned", "other"
"""Kinds of layers; a turned one is linear and keeps its weight as (inputs, outputs)."""


@dataclass(frozen=True)
class Adaptable:
    """The places in a model that peft has room for; layers and modules are called as in the model, tensors as in its file.

    Attributes:
        layers: linear layers, by their weight.
        biases: the linear layers, by their bias.
        modules: small modules that are kept whole, norms and linear layers that keep their weight the other way round than most:
            {module: {tensor: what the model calls it}}.
        turned: whether the linear layers keep their weights as (inputs, outputs).
    """

    layers: Mapping[str, str]
    biases: Mapping[str, str]
    modules: Mapping[str, Mapping[str, str]]
    turned: bool


def adaptable(specs: Mapping[str, Spec], folder: Path) -> Adaptable:
    """What of a model with these tensors an adapter can change.

    Args:
        specs: of the tensors in the model's file.
        folder: where its configuration is, if it has one; the kinds of layers are otherwise told by names and shapes.
    """
    kinds, called = _architecture(folder, specs) or ({}, {n: n for n in specs})
    tensors: dict[str, dict[str, str]] = {}
    for name, own in called.items():
        tensors.setdefault(own.rpartition(".")[0], {})[own] = name
    kinds = kinds or {m: _kind(m, inside, specs) for m, inside in tensors.items()}
    # the projection of PyTorch's own attention is read by its parent, past what an adapter adds
    read_past = {m for m in tensors if f"{m.rpartition('.')[0]}.in_proj_weight" in called.values()}
    turned = TURNED in kinds.values()
    main, other = (TURNED, LINEAR) if turned else (LINEAR, TURNED)
    linear = [
        m for m, inside in tensors.items() if kinds.get(m) == main and m not in read_past and f"{m}.weight" in inside
    ]
    above = {m[:i] for m in tensors for i, c in enumerate(m) if c == "."}
    every = above.union(tensors)
    modules = {
        m: {name: own for own, name in inside.items()}
        for m, inside in tensors.items()
        if m in kinds and m and m not in above | read_past
        if kinds[m] == other or all(len(specs[n].shape) <= 1 for n in inside.values())
        # peft takes all modules whose names end like this
        if not any(o.endswith(m) and o != m for o in every)
    }
    layers = {tensors[m][f"{m}.weight"]: m for m in linear}
    biases = {tensors[m][f"{m}.bias"]: m for m in linear if f"{m}.bias" in tensors[m]}
    return Adaptable(layers, biases, modules, turned)


def names_in_model(names: Iterable[str], folder: Path) -> dict[str, str]:
    """What a model of transformers calls the tensors of its file: {name in the file: name in the model}, empty for other models."""
    found = _architecture(folder, names)
    return {} if found is None else found[1]


def _kind(module: str, inside: Mapping[str, str], specs: Mapping[str, Spec]) -> str:
    weight = specs.get(f"{module}.weight")
    plain = {n.rpartition(".")[2] for n in inside} <= {"weight", "bias"}
    linear = plain and weight is not None and len(weight.shape) == 2 and not EMBEDDING.search(module)
    return LINEAR if linear else OTHER


def _architecture(folder: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """The kinds of modules by their names, and what the model calls the tensors of its file; None for an unknown architecture."""
    if not (folder / CONFIG).exists():
        return None
    try:
        import transformers
        from transformers.pytorch_utils import Conv1D

        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture = getattr(transformers, said["architectures"][0])
        config = architecture.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = architecture(config)
        called = called_in(model, names)
    except Exception:  # a configuration of another library, or of none
        return None
    kinds = ((TURNED, Conv1D), (LINEAR, torch.nn.Linear), (OTHER, torch.nn.Module))
    return {n: next(kind for kind, cls in kinds if isinstance(m, cls)) for n, m in model.named_modules()}, called


def called_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What a model calls the tensors of its file: {name in the file: name in the model}.

    Newer releases of transformers rename tensors as they load; those that they put together from several have no name here.
    """
    if not hasattr(model, "base_model_prefix"):
        return {n: n for n in names}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {n: n for n in names}
    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [s for s in steps if isinstance(s, WeightRenaming)]
    converters: list[Any] = [s for s in steps if not isinstance(s, WeightRenaming)]
    found = {n: rename_source_key(n, renamings, converters, model.base_model_prefix, state) for n in names}
    return {n: own for n, (own, put_together) in found.items() if put_together is None and own in state}

"""What of a model an adapter can change: matrices of linear layers at a low rank, norms and biases whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from polytask.merging.matching import Spec
from polytask.merging.proxy import CONFIG

EMBEDDING = re.compile(r"emb|wte|wpe|shared|relative_attention_bias")
"""In names of matrices that are tables of rows, where no architecture tells."""

LINEAR, TURNED, OTHER = "linear", "turned", "other"
"""Kinds of layers; a turned one is linear and keeps its weight as (inputs, outputs)."""


@dataclass(frozen=True)
class Adaptable:
    """The places in a model that peft has room for.

    Attributes:
        layers: linear layers, by the name of their weight.
        biases: the linear layers, by the name of their bias.
        modules: small modules that are kept whole, with the names of all their tensors: norms, and linear layers that keep their
            weight the other way round than most.
        turned: whether the linear layers keep their weights as (inputs, outputs).
    """

    layers: Mapping[str, str]
    biases: Mapping[str, str]
    modules: Mapping[str, tuple[str, ...]]
    turned: bool


def adaptable(specs: Mapping[str, Spec], folder: Path) -> Adaptable:
    """What of a model with these tensors an adapter can change.

    Args:
        specs: of the model's tensors.
        folder: where its configuration is, if it has one; the kinds of layers are otherwise told by names and shapes.
    """
    tensors: dict[str, list[str]] = {}
    for name in specs:
        tensors.setdefault(name.rpartition(".")[0], []).append(name)
    known = _kinds(folder)
    kinds = known or {m: _kind(m, names, specs) for m, names in tensors.items()}
    # the projection of PyTorch's own attention is read by its parent, past what an adapter adds
    inside = {m for m in tensors if f"{m.rpartition('.')[0]}.in_proj_weight" in specs}
    turned = TURNED in kinds.values()
    main, other = (TURNED, LINEAR) if turned else (LINEAR, TURNED)
    linear = [m for m in tensors if kinds.get(m) == main and m not in inside and f"{m}.weight" in specs]
    above = {m[:i] for m in tensors for i, c in enumerate(m) if c == "."}
    every = above.union(tensors)
    whole = {
        m: tuple(names)
        for m, names in tensors.items()
        if m in kinds and m and m not in above | inside
        if kinds[m] == other or all(len(specs[n].shape) <= 1 for n in names)
        # peft takes all modules whose names end like this
        if not any(o.endswith(m) and o != m for o in every)
    }
    biases = {f"{m}.bias": m for m in linear if f"{m}.bias" in specs}
    return Adaptable({f"{m}.weight": m for m in linear}, biases, whole, turned)


def _kind(module: str, names: list[str], specs: Mapping[str, Spec]) -> str:
    weight = specs.get(f"{module}.weight")
    plain = {n.rpartition(".")[2] for n in names} <= {"weight", "bias"}
    linear = plain and weight is not None and len(weight.shape) == 2 and not EMBEDDING.search(module)
    return LINEAR if linear else OTHER


def _kinds(folder: Path) -> dict[str, str] | None:
    """The kinds of modules of an architecture that transformers has, by their names; None where it tells none."""
    if not (folder / CONFIG).exists():
        return None
    try:
        import transformers
        from transformers.pytorch_utils import Conv1D

        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture = getattr(transformers, said["architectures"][0])
        config = architecture.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            modules = dict(architecture(config).named_modules())
    except Exception:  # a configuration of another library, or of none
        return None
    kinds = ((TURNED, Conv1D), (LINEAR, torch.nn.Linear), (OTHER, torch.nn.Module))
    return {n: next(kind for kind, cls in kinds if isinstance(m, cls)) for n, m in modules.items()}

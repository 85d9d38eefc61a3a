"""Writing what a merge changed as an adapter: the merged update of each layer, at a low rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.errors import InputError, StorageError
from polytask.merging.adaptable import adaptable
from polytask.merging.adapter import WEIGHTS, Adapter, Update, placed, read_adapter
from polytask.merging.checkpoint import ADAPTER
from polytask.merging.hub import fetched
from polytask.merging.matching import spec_of
from polytask.merging.on_disk import MergePlan, check_target, put
from polytask.merging.safetensors_file import Writer
from polytask.merging.spectral import leading_triplets
from polytask.merging.stored import TensorFolder

UNCHANGED = 1e-6
"""The part of a tensor's length up to which its update is rounding."""


class Loss(NamedTuple):
    """What an adapter does not hold of a merge.

    Attributes:
        share: of the squared update, cut off or left out.
        left_out: tensors that changed and are not in it at all.
    """

    share: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """Where in an adapter the merged tensors go.

    Attributes:
        layers: {weight: its layer}, for updates at a low rank.
        settings: of the adapter's configuration.
        turned: whether the layers keep their weights as (inputs, outputs).
        biases: {bias: its layer}, for those that are kept whole where they changed.
        modules: {module: {tensor: what the model calls it}}, the same for modules.
    """

    layers: Mapping[str, str]
    settings: Mapping[str, Any]
    turned: bool
    biases: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@torch.no_grad()
def write_adapter(plan: MergePlan, folder: Path, rank: int | None = None, *, overwrite: bool = False) -> Loss:
    r"""Merge as planned, and write the outcome as an adapter of the base.

    Each layer's merged update is cut to its leading singular triplets, :math:`D \approx U S V^\top`, and stored as
    :math:`B = U S^{1/2}`, :math:`A = S^{1/2} V^\top` with scale 1. Means and sums of adapters have no more than the sum of their ranks,
    so that nothing is lost unless a smaller rank is asked for; other methods, and whole models, lose what the return value tells.

    Of whole models all linear layers are cut to the rank; norms and biases that changed are kept whole, as peft's ``modules_to_save``
    and ``bias``. Other tensors that changed, embeddings and convolutions, have no place in the adapter: they count as lost.

    Args:
        plan: its method needs no statistics. Its experts are all adapters of its base, or fine-tuned models.
        folder: a new one; peft loads it.
        rank: of every layer; the sum of the adapters' ranks when omitted.
        overwrite: replace what is there.

    Raises:
        InputError: adapters that hold whole tensors, or change what is no matrix of a linear layer; whole models without a rank, or of
            which no linear layer changed; the folder exists.
        StorageError: a file cannot be read or written.

    Cost: as the merge, and one eigendecomposition of the smaller side a layer.
    """
    check_target(plan, folder, overwrite)
    if rank is not None and rank < 1:
        raise InputError(f"the rank of an adapter is at least 1, not {rank}")
    if plan.base is None:
        raise InputError("an adapter changes a base: name the one that the models started from")
    if plan.proxy is not None or plan.routing is not None:
        raise InputError(f"{plan.method} looks at data with whole models: its result cannot be written as an adapter")
    adapters = _adapters(plan)
    if adapters:
        room = _layers(plan, adapters)
        rank = rank or sum(max(a.tensors.specs[u.A].shape[0] for u in a.updates.values()) for a in adapters)
    elif rank is None:
        raise InputError("whole models have no ranks to add up: say which rank the adapter gets, such as 16")
    else:
        room = _room(plan)
    plan.engine.survey(plan.match.merged, plan.load)
    work = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        # adapters change their layers alone
        loss = _write(plan, work, room, rank, room.layers if adapters else plan.match.merged)
        put(work, folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {(error.strerror or 'unknown reason').lower()}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return loss


def _adapters(plan: MergePlan) -> list[Adapter]:
    """The experts, where all of them are adapters."""
    found = []
    if any("+" in str(p) and not p.exists() for p in plan.experts):
        return []
    paths = [fetched(p) for p in plan.experts]
    if not all((p / ADAPTER).exists() for p in paths):
        return []
    for path in paths:
        adapter = read_adapter(path)
        adapter.check_low_rank()
        if any(u.bias for u in adapter.updates.values()):
            raise InputError(f"{path} also holds a bias: here adapters are low-rank updates alone")
        found.append(adapter)
    return found


def _layers(plan: MergePlan, adapters: list[Adapter]) -> Room:
    """Every layer that an adapter changes, as the first one calls it."""
    layers: dict[str, tuple[str, Update]] = {}
    for adapter in adapters:
        for weight, layer in placed(adapter, plan.models[0]).items():
            layers.setdefault(weight, (layer, adapter.updates[layer]))
    for weight, (_, u) in layers.items():
        plain = u.A.endswith("weight") and len(plan.specs[weight].shape) == 2 and ".base_layer." not in u.A
        if not plain or weight not in plan.match.merged:
            raise InputError(f"{weight} is not merged as the matrix of a linear layer: no adapter can be written")
    turned = {u.turned for _, u in layers.values()}
    if len(turned) > 1:
        raise InputError("some adapters keep their weights turned around (fan_in_fan_out) and some do not")
    said: dict[str, Any] = json.loads((adapters[0].path / ADAPTER).read_text(encoding="utf-8"))
    return Room({weight: layer for weight, (layer, _) in layers.items()}, said, turned.pop())


def _room(plan: MergePlan) -> Room:
    """What there is room for of whole models."""
    found = adaptable(plan.specs, plan.models[0].path)
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(plan.base),
        "fan_in_fan_out": found.turned,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "task_type": None,
    }
    return Room(found.layers, said, found.turned, found.biases, found.modules)


def _write(plan: MergePlan, work: Path, room: Room, r: int, merged: Iterable[str]) -> Loss:
    """The adapter's files; tensors wait in files of their own until it is known what changed."""
    waiting = TensorFolder(work / "waiting")
    module_of = {n: m for m, names in room.modules.items() for n in names}
    layers: list[str] = []
    biases: list[str] = []
    modules: list[str] = []
    left_out: list[str] = []
    lost = altogether = 0.0
    for name in merged:
        W0, W = plan.load(name)
        assert W0 is not None
        D = plan.engine.merge(name, W0.clone(), W).sub_(W0)
        squared = float(D.square().sum())
        altogether += squared
        if squared <= (UNCHANGED * float(W0.norm())) ** 2:
            lost += squared
        elif name in room.layers:
            A, B = _factors(D.T if room.turned else D, r)
            lost += float((D - ((B @ A).T if room.turned else B @ A)).square().sum())
            layers.append(room.layers[name])
            waiting[_stored(layers[-1], "A")], waiting[_stored(layers[-1], "B")] = A.float(), B.float()
        elif name in module_of or name in room.biases:
            (modules if name in module_of else biases).append(module_of.get(name, name))
            spec = plan.specs[name]
            waiting[name] = W0.add_(D).reshape(spec.shape).to(spec.torch_dtype)
        else:
            lost += squared
            left_out.append(name)
    if not layers:
        raise InputError("no matrix of a linear layer changed: there is nothing for an adapter to hold")
    names = {n: n for layer in layers for n in (_stored(layer, "A"), _stored(layer, "B"))}
    for bias in biases:
        layer = room.biases[bias]
        names[bias] = f"base_model.model.{layer}{'.base_layer' * (layer in layers)}.bias"
    for module in dict.fromkeys(modules):
        for n, own in room.modules[module].items():
            names[n] = f"base_model.model.{own}"
            if n not in waiting:
                waiting[n] = plan.models[0].read(n)
    with Writer(work / WEIGHTS[0], {stored: spec_of(waiting[n]) for n, stored in names.items()}) as writer:
        for n, stored in names.items():
            writer.add(stored, waiting[n])
    shutil.rmtree(waiting.folder)
    said = _configuration(room, layers, list(dict.fromkeys(modules)), bool(biases), r)
    (work / ADAPTER).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return Loss(lost / altogether if altogether else 0.0, tuple(left_out))


def _factors(D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, s, Vh = leading_triplets(D.contiguous(), min(r, *D.shape))
    root = s.sqrt()
    missing = r - len(s)
    return F.pad(root[:, None] * Vh, (0, 0, 0, missing)), F.pad(U * root, (0, missing))


def _configuration(room: Room, layers: list[str], modules: list[str], biases: bool, r: int) -> dict[str, Any]:
    plain = {"lora_alpha": r, "r": r, "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
    return {
        **room.settings,
        **plain,
        "bias": "all" if biases else "none",
        "init_lora_weights": True,
        "modules_to_save": modules or None,
        "target_modules": sorted(layers),
    }


def _stored(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.lora_{part}.weight"

"""Merging adapters into an adapter: the merged update of each layer, at a low rank again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.errors import InputError, StorageError
from polytask.merging.adapter import WEIGHTS, Adapter, Update, placed, read_adapter
from polytask.merging.checkpoint import ADAPTER
from polytask.merging.hub import fetched
from polytask.merging.matching import Spec
from polytask.merging.on_disk import MergePlan
from polytask.merging.safetensors_file import Writer
from polytask.merging.spectral import leading_triplets


@torch.no_grad()
def write_adapter(plan: MergePlan, folder: Path, rank: int | None = None) -> float:
    r"""Merge adapters of one base as planned, and write the outcome as one more adapter of it.

    Each layer's merged update is cut to its leading singular triplets, :math:`D \approx U S V^\top`, and stored as
    :math:`B = U S^{1/2}`, :math:`A = S^{1/2} V^\top` with scale 1. Means and sums of adapters have no more than the sum of their ranks,
    so that nothing is lost unless a smaller rank is asked for; other methods lose what the return value tells.

    Args:
        plan: its experts are adapters of its base, and its method needs no statistics.
        folder: a new one; peft loads it.
        rank: of every layer; the sum of the adapters' ranks when omitted.

    Returns:
        The share of the squared update that was cut off.

    Raises:
        InputError: an expert that is no adapter, holds whole tensors, or changes what is no matrix of a linear layer; the folder exists.
        StorageError: a file cannot be read or written.

    Cost: as the merge, and one eigendecomposition of the smaller side a layer.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: name another folder")
    if rank is not None and rank < 1:
        raise InputError(f"the rank of an adapter is at least 1, not {rank}")
    adapters = _adapters(plan)
    layers = _layers(plan, adapters)
    if plan.proxy is not None or plan.routing is not None:
        raise InputError(f"{plan.method} looks at data with whole models: its result cannot be written as an adapter")
    r = rank or sum(max(a.tensors.specs[u.A].shape[0] for u in a.updates.values()) for a in adapters)
    plan.engine.survey(plan.match.merged, plan.load)
    work = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        lost, whole = _write(plan, work / WEIGHTS[0], layers, r)
        said = _configuration(adapters[0], layers, r)
        (work / ADAPTER).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        os.replace(work, folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {(error.strerror or 'unknown reason').lower()}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return lost / whole if whole else 0.0


def _adapters(plan: MergePlan) -> list[Adapter]:
    found = []
    for path in map(fetched, plan.experts):
        if not (path / ADAPTER).exists() or plan.base is None:
            raise InputError(f"{path} is no adapter: adapters of one base alone make an adapter")
        adapter = read_adapter(path)
        adapter.check_low_rank()
        if any(u.bias for u in adapter.updates.values()):
            raise InputError(f"{path} also holds a bias: here adapters are low-rank updates alone")
        found.append(adapter)
    return found


def _layers(plan: MergePlan, adapters: list[Adapter]) -> dict[str, tuple[str, Update]]:
    """By the weight: its layer, as the first adapter that changes it calls it, and that adapter's update."""
    layers: dict[str, tuple[str, Update]] = {}
    for adapter in adapters:
        for weight, layer in placed(adapter, plan.models[0]).items():
            layers.setdefault(weight, (layer, adapter.updates[layer]))
    for weight, (_, u) in layers.items():
        plain = u.A.endswith("weight") and len(plan.specs[weight].shape) == 2 and ".base_layer." not in u.A
        if not plain or weight not in plan.match.merged:
            raise InputError(f"{weight} is not merged as the matrix of a linear layer: no adapter can be written")
    if len({u.turned for _, u in layers.values()}) > 1:
        raise InputError("some adapters keep their weights turned around (fan_in_fan_out) and some do not")
    return layers


def _write(plan: MergePlan, file: Path, layers: Mapping[str, tuple[str, Update]], r: int) -> tuple[float, float]:
    specs: dict[str, Spec] = {}
    for weight, (layer, u) in layers.items():
        out, width = plan.specs[weight].shape[::-1] if u.turned else plan.specs[weight].shape
        specs[_stored(layer, "A")] = Spec((r, width), "float32")
        specs[_stored(layer, "B")] = Spec((out, r), "float32")
    lost = whole = 0.0
    with Writer(file, specs) as writer:
        for weight, (layer, u) in layers.items():
            W0, W = plan.load(weight)
            assert W0 is not None
            D = plan.engine.merge(weight, W0.clone(), W).sub_(W0)
            A, B = _factors(D.T if u.turned else D, r)
            lost += float((D - ((B @ A).T if u.turned else B @ A)).square().sum())
            whole += float(D.square().sum())
            writer.add(_stored(layer, "A"), A.float())
            writer.add(_stored(layer, "B"), B.float())
    return lost, whole


def _factors(D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, s, Vh = leading_triplets(D.contiguous(), min(r, *D.shape))
    root = s.sqrt()
    missing = r - len(s)
    return F.pad(root[:, None] * Vh, (0, 0, 0, missing)), F.pad(U * root, (0, missing))


def _configuration(first: Adapter, layers: Mapping[str, tuple[str, Update]], r: int) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((first.path / ADAPTER).read_text(encoding="utf-8"))
    plain = {"lora_alpha": r, "r": r, "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False, "bias": "none"}
    return {
        **said,
        **plain,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(layer for layer, _ in layers.values()),
    }


def _stored(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.lora_{part}.weight"

"""Putting experts into a model, and such a model into one folder and back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polytask
from polytask.errors import InputError, StorageError
from polytask.merging.checkpoint import Checkpoint, open_checkpoint
from polytask.merging.matching import dtype_name, spec_of
from polytask.merging.routed import LowRank, Mix, RoutedLinear, expert_names, routed_layers
from polytask.merging.routed_attention import RoutedAttention
from polytask.merging.routers import KINDS, Router
from polytask.merging.safetensors_file import NAMES, Writer

FORMAT = 1
BASE = "model.safetensors"
EXPERTS = "experts.safetensors"
ROUTING = "routing.json"


def add_experts(
    model: nn.Module,
    names: Sequence[str],
    experts: Mapping[str, LowRank],
    router: Callable[[str, LowRank], Router],
    mix: Mix = "outputs",
) -> nn.Module:
    """Put low-rank experts beside linear layers of a model, in its place.

    Args:
        model: its linear layers (:class:`torch.nn.Linear`, and those within :class:`torch.nn.MultiheadAttention`) are replaced.
        names: of the experts.
        experts: by the name of the weight, as in the state dict: ``blocks.0.fc.weight``, ``blocks.0.attn.in_proj_weight``.
        router: makes the router of a layer, given the weight's name and its experts.
        mix: see :class:`~polytask.merging.routed.RoutedLinear`.

    Returns:
        The model itself; its state dict has kept its names and got some more.

    Raises:
        InputError: two experts of one name, no such linear layer, shapes that do not fit.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(f"experts need names, each its own, not {', '.join(names) or 'none'}")
    for weight, low in experts.items():
        if len(low.A) != len(names):
            raise InputError(f"{weight} has {len(low.A)} experts, and {len(names)} are named")
        _check_linear(model, weight)
    for weight, low in experts.items():
        holder, attribute = _holder(model, weight)
        linear = getattr(holder, attribute)
        setattr(
            holder, attribute, RoutedLinear(linear, low.A, low.B, router(weight, low), mix, low.C).train(model.training)
        )
    model.expert_names = tuple(names)  # type: ignore[assignment]
    _forbid_fused_paths(model)
    return model


def save_routed(model: nn.Module, folder: Path) -> None:
    """Write a model with experts as one folder: the base, the experts with their routers, and ``routing.json``; no pickle.

    Raises:
        InputError: no routed layer, the folder exists already, a dtype that safetensors has not.
        StorageError: it cannot be written.
    """
    layers = routed_layers(model)
    if folder.exists():
        raise InputError(f"{folder} exists already: name another folder")
    base, experts = _divided(model)
    said = {
        "polytask": polytask.__version__,
        "format": FORMAT,
        "experts": list(expert_names(model)),
        "layers": [
            {"weight": weight_name(model, n), "router": m.router.kind, "options": m.router.options, "mix": m.mix}
            for n, m in layers.items()
        ],
    }
    work = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        for file, tensors in ((BASE, base), (EXPERTS, experts)):
            _write(work / file, tensors)
        (work / ROUTING).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        os.replace(work, folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {(error.strerror or 'unknown reason').lower()}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


@torch.no_grad()
def load_routed(folder: Path, model: nn.Module) -> nn.Module:
    """Read what :func:`save_routed` wrote into a model of the base's architecture.

    Args:
        folder: as it was written.
        model: built as the base was; its weights are overwritten and experts put in.

    Returns:
        The model itself.

    Raises:
        InputError: a model of another architecture, a folder of something else.
        StorageError: a file is missing or cut short.
    """
    said = _read_routing(folder)
    base, experts = (open_checkpoint(folder / file) for file in (BASE, EXPERTS))
    state = model.state_dict()
    _check_same({n: tuple(t.shape) for n, t in state.items()}, base)
    layers = {entry["weight"]: entry for entry in said["layers"]}
    for weight, entry in layers.items():
        wrong = f"{weight}/A" not in experts.specs or f"{weight}/B" not in experts.specs or entry["router"] not in KINDS
        if wrong:
            raise InputError(f"{folder / EXPERTS} does not hold the experts of {weight} that {ROUTING} tells of")
    for name, tensor in state.items():
        tensor.copy_(base.read(name))
    low = {
        w: LowRank(*(experts.read(f"{w}/{part}") for part in "ABC" if f"{w}/{part}" in experts.specs)) for w in layers
    }
    add_experts(model, said["experts"], low, lambda weight, _: _router(weight, layers[weight], experts))
    for module, entry in zip(routed_layers(model).values(), _in_order(model, layers), strict=True):
        module.mix = entry["mix"]
    return model


def _holder(model: nn.Module, weight: str) -> tuple[nn.Module, str]:
    """The module that has the linear layer of a weight, and as what; attention is opened up on the way."""
    owner, _, leaf = weight.rpartition(".")
    path = f"{owner}.in_proj" if leaf == "in_proj_weight" else owner
    parent, _, attribute = path.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.MultiheadAttention):
        opened = RoutedAttention(holder)
        above, _, own = parent.rpartition(".")
        setattr(model.get_submodule(above), own, opened)
        holder = opened
    return holder, attribute


def _check_linear(model: nn.Module, weight: str) -> None:
    owner, _, leaf = weight.rpartition(".")
    kind: type[nn.Module] | tuple[type[nn.Module], ...]
    kind = (nn.MultiheadAttention, RoutedAttention) if leaf == "in_proj_weight" else nn.Linear
    try:
        found = model.get_submodule(owner)
    except AttributeError:
        found = None
    if (
        not owner
        or isinstance(model, nn.MultiheadAttention)
        or leaf not in ("weight", "in_proj_weight")
        or not isinstance(found, kind)
    ):
        raise InputError(
            f"{weight} is not the weight of a linear layer within the model, so that no expert can join it"
        )


def _forbid_fused_paths(model: nn.Module) -> None:
    # in evaluation PyTorch's encoders hand their weights to one fused kernel, past every module within them
    for module in model.modules():
        routed = any(isinstance(m, RoutedLinear) for m in module.modules())
        if routed and isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if routed and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _divided(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict's tensors of the base under their names in the plain model, and those of experts and routers."""
    layers = routed_layers(model)
    opened = {n for n, m in model.named_modules() if isinstance(m, RoutedAttention)}
    base: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = next((n for n in layers if name.startswith(f"{n}.")), "")
        inner = name.removeprefix(f"{layer}.")
        owner, _, leaf = name.rpartition(".in_proj.")
        if layer and inner not in ("weight", "bias"):
            experts[f"{weight_name(model, layer)}/{inner}"] = tensor
        else:
            base[f"{owner}.in_proj_{leaf}" if leaf and owner in opened else name] = tensor
    return base, experts


def weight_name(model: nn.Module, layer: str) -> str:
    """The name that the weight of a routed layer has in the plain model."""
    parent, _, leaf = layer.rpartition(".")
    stacked = leaf == "in_proj" and isinstance(model.get_submodule(parent), RoutedAttention)
    return f"{parent}.in_proj_weight" if stacked else f"{layer}.weight"


def _in_order(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [layers[weight_name(model, n)] for n in routed_layers(model)]


def _router(weight: str, entry: Mapping[str, Any], experts: Checkpoint) -> Router:
    start = f"{weight}/router."
    tensors = {n.removeprefix(start): experts.read(n) for n in experts.specs if n.startswith(start)}
    return KINDS[entry["router"]](**tensors, **entry["options"])


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    unknown = [n for n, t in tensors.items() if dtype_name(t.dtype) not in NAMES]
    if unknown:
        raise InputError(f"the tensor {unknown[0]} is {tensors[unknown[0]].dtype}, which safetensors has not")
    with Writer(file, {n: spec_of(t) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.detach().cpu())


def _read_routing(folder: Path) -> dict[str, Any]:
    file = folder / ROUTING
    if not file.exists():
        raise StorageError(f"there is no {ROUTING} in {folder}: it is no folder of a model with experts")
    try:
        said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = said["format"] == FORMAT and all(isinstance(e["weight"], str) for e in said["layers"])
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise InputError(f"{file} does not describe a model with experts in the format {FORMAT}")
    return said


def _check_same(shapes: Mapping[str, tuple[int, ...]], base: Checkpoint) -> None:
    for name in [*shapes, *base.specs]:
        if name not in base.specs or name not in shapes:
            having, lacking = (base.path, "the model given") if name in base.specs else ("the model given", base.path)
            raise InputError(f"{lacking} has no tensor {name}, which {having} has: build the base's architecture")
        if shapes[name] != base.specs[name].shape:
            raise InputError(
                f"the tensor {name} has shape {list(base.specs[name].shape)} in {base.path} and {list(shapes[name])} in the model given"
            )

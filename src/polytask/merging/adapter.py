"""LoRA adapters as the peft library stores them, opened as the whole models that they stand for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from polytask.errors import InputError, StorageError
from polytask.merging.adaptable import names_in_model
from polytask.merging.checkpoint import ADAPTER, Checkpoint, open_checkpoint
from polytask.merging.hub import fetched, headers, on_hub
from polytask.merging.matching import Spec

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPING = re.compile(r"^base_model\.model\.|base_layer\.|(modules_to_save|original_module)\.([^.]+\.)?")
LORA = re.compile(r"^(?P<layer>.+)\.lora_(?P<part>A|B)(\.[^.]+)?\.(?P<leaf>weight|bias)$")
EMBEDDING = re.compile(r"^(?P<layer>.+)\.lora_embedding_(?P<part>A|B)(\.[^.]+)?$")
MAGNITUDE = re.compile(r"^(?P<layer>.+)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$")
BEYOND = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings under which an adapter is more than W + s B A, with rows of other lengths at most."""

TWICE_UNTIL = "0.21.2"
"""Up to here peft adds the update of an attention's ``out_proj`` twice, in training as in merging (huggingface/peft, pull request 3774)."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it was; others take a part of it away."""


@dataclass(frozen=True)
class Update:
    r"""One layer's update :math:`s B A`, as names in the adapter's file.

    Attributes:
        A: name of A, (rank, inputs).
        B: name of B, (outputs, rank).
        scale: s, alpha over the rank or its root.
        turned: whether the layer keeps its weight as (inputs, outputs).
        bias: name of what s times is added to the layer's bias, if anything.
        magnitude: name of the lengths that the rows of the sum are brought to, if any are (DoRA, arXiv:2402.09353).
    """

    A: str
    B: str
    scale: float
    turned: bool
    bias: str | None
    magnitude: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        path: its folder.
        base: what its base is called in its configuration, a path or a name on a hub.
        tensors: its file.
        updates: by the layer's name.
        replaced: tensors that it holds whole, such as task heads: {name in the model: name in the file}.
    """

    path: Path
    base: str | None
    tensors: Checkpoint
    updates: Mapping[str, Update]
    replaced: Mapping[str, str]

    def check_low_rank(self) -> None:
        """Refuse an adapter that is more than low-rank updates.

        Raises:
            InputError: it holds whole tensors, or brings rows to lengths of their own.
        """
        if self.replaced:
            raise InputError(
                f"{self.path} holds {next(iter(self.replaced))} whole: here adapters are low-rank updates alone"
            )
        dora = [layer for layer, u in self.updates.items() if u.magnitude is not None]
        if dora:
            raise InputError(f"{self.path} is a DoRA of {dora[0]}: here adapters are low-rank updates alone")

    def pair(self, layer: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A and s B of a layer, so that the update of a weight (outputs, inputs) is their product; convolutions are flattened."""
        u = self.updates[layer]
        A, B = (self.tensors.read(n, dtype or torch.float32).flatten(1) for n in (u.A, u.B))
        return A, B.mul_(u.scale)


def open_expert(path: Path, base: Checkpoint | None, *, headers_only: bool = False) -> Checkpoint:
    """Open a fine-tuned model, which may be an adapter of the base.

    Args:
        path: what :func:`~polytask.merging.checkpoint.open_checkpoint` takes, a folder of an adapter, or ``MODEL+ADAPTER`` for an
            adapter of another model.
        base: what a lone adapter is put on.
        headers_only: of a model on the hub fetch no weights; its tensors cannot be read then.

    Raises:
        InputError: an adapter without base or for another one, or of another kind than LoRA.
        StorageError: a file is missing or cut short.
    """
    own, plus, adapter = str(path).rpartition("+")
    joined = bool(plus and own) and not path.exists()
    if joined:
        base, path = open_expert(Path(own), base, headers_only=headers_only), Path(adapter)
    if headers_only and on_hub(path) and (specs := headers(path)) is not None:
        return Checkpoint(path, specs, (), _unread)
    path = fetched(path)
    if not (path / ADAPTER).exists():
        if joined:
            raise InputError(f"{adapter} is no adapter: a + stands between a model and its adapter")
        return open_checkpoint(path)
    if base is None:
        raise InputError(f"{path} holds an adapter: name the base that it belongs to, or BASE+{path}")
    return on_base(read_adapter(path), base)


def _unread(name: str, out: Tensor) -> None:  # noqa: ARG001
    raise AssertionError("only the headers were fetched")


def read_adapter(folder: Path) -> Adapter:
    """Read what an adapter changes; values are not read yet.

    Raises:
        InputError: it is of another kind than LoRA, or does more than LoRA.
        StorageError: a file is missing or cut short.
    """
    said = _configuration(folder / ADAPTER)
    files = [folder / f for f in WEIGHTS if (folder / f).exists()]
    if not files:
        raise StorageError(f"there is no {WEIGHTS[0]} in {folder}")
    tensors = open_checkpoint(files[0])
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for stored in tensors.specs:
        name = WRAPPING.sub("", stored)
        found = LORA.match(name) or EMBEDDING.match(name) or MAGNITUDE.match(name)
        if found:
            said_of = {"leaf": "embedding", **found.groupdict()}
            part = f"{said_of['part']} {said_of['leaf']}" if "part" in said_of else "magnitude"
            parts.setdefault(found["layer"], {})[part] = stored
        else:
            replaced[name] = stored
    updates = {layer: _update(layer, have, said, tensors) for layer, have in parts.items()}
    if not updates:
        raise InputError(f"{files[0]} holds no LoRA: none of its tensors is called lora_A")
    return Adapter(folder, said.get("base_model_name_or_path"), tensors, updates, replaced)


def on_base(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    r"""The model :math:`W_0 + s B A` that an adapter makes of its base, computed as each tensor is read.

    Raises:
        InputError: the adapter is for another base.
    """
    rename = _renaming(adapter, base)
    updates = {weight: adapter.updates[layer] for weight, layer in placed(adapter, base).items()}
    biases = {f"{rename(layer)}.bias": u for layer, u in adapter.updates.items() if u.bias is not None}
    # what the base has not, a head of its own, keeps its name
    replaced = {rename(n) if rename(n) in base.specs else n: stored for n, stored in adapter.replaced.items()}
    lacking = [n for n in biases if n not in base.specs]
    if lacking:
        raise InputError(f"the adapter {adapter.path} adds to {lacking[0]}, which {base.path} has not")
    _check_named_base(adapter, next(iter(updates)), base)
    specs = dict(base.specs)
    for name, stored in replaced.items():
        own = adapter.tensors.specs[stored]
        specs[name] = Spec(own.shape, specs[name].dtype if name in specs else own.dtype)

    def read_into(name: str, out: Tensor) -> None:
        exact = out if out.dtype in (torch.float32, torch.float64) or name not in {**updates, **biases} else out.float()
        source, stored = (adapter.tensors, replaced[name]) if name in replaced else (base, name)
        source.read_into(stored, exact)
        if name in updates:
            _add(adapter.tensors, updates[name], exact)
        if name in biases:
            u = biases[name]
            assert u.bias is not None
            exact.add_(adapter.tensors.read(u.bias, exact.dtype), alpha=u.scale)
        if exact is not out:
            out.copy_(exact)

    return Checkpoint(adapter.path, specs, (adapter.path / ADAPTER, *adapter.tensors.files, *base.files), read_into)


def placed(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """Which weight of the base each layer of an adapter changes: {weight: layer}.

    Raises:
        InputError: the base has no such weight, or one of another shape.
    """
    rename = _renaming(adapter, base)
    found = {_weight(rename(layer), base.specs): layer for layer in adapter.updates}
    for name, layer in found.items():
        u = adapter.updates[layer]
        A, B = (adapter.tensors.specs[n].shape for n in (u.A, u.B))
        shape = (A[1], B[0]) if u.turned else (B[0], *A[1:])
        if shape != base.specs[name].shape:
            raise InputError(
                f"the adapter {adapter.path} changes {name} as a tensor of shape {list(shape)}, and {base.path} has "
                f"{list(base.specs[name].shape)}: it is for another base"
                + (f" ({adapter.base})" if adapter.base else "")
            )
    return found


def _add(tensors: Checkpoint, u: Update, W: Tensor) -> None:
    A, B = (tensors.read(n, W.dtype).flatten(1) for n in (u.A, u.B))
    flat = W.flatten(1)
    flat.addmm_(*((A.T, B.T) if u.turned else (B, A)), alpha=u.scale)
    if u.magnitude is not None:
        length = flat.norm(dim=0 if u.turned else 1, keepdim=True)
        wanted = tensors.read(u.magnitude, W.dtype).reshape(length.shape)
        flat.mul_(wanted / torch.where(length > 0, length, 1.0))


def _configuration(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise InputError(f"{file} is not the configuration of an adapter: it is no JSON object")
    if said.get("peft_type") != "LORA":
        raise InputError(f"{file} describes an adapter of the kind {said.get('peft_type')}: only LORA can be merged")
    beyond = [k for k in BEYOND if said.get(k)]
    if beyond:
        raise InputError(f"{file} sets {beyond[0]}: such an adapter is more than a low-rank update")
    if said.get("init_lora_weights") not in PLAIN_STARTS:
        raise InputError(
            f"{file} says that training began with {said['init_lora_weights']!r}, which changes the base: convert it to plain LoRA first"
        )
    return said


def _update(layer: str, have: Mapping[str, str], said: Mapping[str, Any], tensors: Checkpoint) -> Update:
    embedding = "A embedding" in have
    leaf = "embedding" if embedding else "weight"
    A, B = have.get(f"A {leaf}"), have.get(f"B {leaf}")
    if A is None or B is None:
        raise InputError(f"{tensors.path} has only one half of the update of {layer}: it is cut or of another kind")
    r, shape = tensors.specs[A].shape[0], tensors.specs[B].shape
    if len(shape) < 2 or shape[1] != r:
        raise InputError(f"A and B of {layer} in {tensors.path} do not fit: ranks {r} and {list(shape)[1:2]}")
    alpha = float(_by_pattern(said.get("alpha_pattern") or {}, layer, said.get("lora_alpha") or r))
    scale = alpha / math.sqrt(r) if said.get("use_rslora") else alpha / r
    if ".base_layer.out_proj.lora_" in A:
        scale *= _times_out_proj(said, tensors.path)
    magnitude = have.get("magnitude")
    if (magnitude is None) == bool(said.get("use_dora")) or (magnitude is not None and (embedding or "B bias" in have)):
        raise InputError(f"{tensors.path} has a DoRA of {layer} that cannot be read: let peft merge it first")
    return Update(A, B, scale, embedding or bool(said.get("fan_in_fan_out")), have.get("B bias"), magnitude)


def _times_out_proj(said: Mapping[str, Any], path: Path) -> int:
    version = str(said.get("peft_version") or "0").partition("@")[0]
    if Version(version) > Version(TWICE_UNTIL):
        raise InputError(
            f"{path} is of peft {version}, and whether that adds an attention's out_proj once or, as up to {TWICE_UNTIL}, twice is "
            "not known: let peft merge it first"
        )
    return 2


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value for a layer whose name, or the end of whose name, a pattern matches: the first one does, as peft has it."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", layer)), default)


def _weight(layer: str, specs: Iterable[str]) -> str:
    """The name of a layer's weight; attention of PyTorch's own calls it otherwise."""
    return f"{layer}.in_proj_weight" if f"{layer}.in_proj_weight" in specs else f"{layer}.weight"


def _renaming(adapter: Adapter, base: Checkpoint) -> Callable[[str], str]:
    """How layers are called in the base.

    A model with a task head has one more step in its names than the model alone, and newer releases of transformers rename as they load.
    """
    tops = {n.partition(".")[0] for n in base.specs}
    known: list[Callable[[str], str]] = [lambda n: n, lambda n: n.partition(".")[2]]
    known += [lambda n, t=t: f"{t}.{n}" for t in sorted(tops)]  # type: ignore[misc]
    for rename in known:
        if all(_weight(rename(layer), base.specs) in base.specs for layer in adapter.updates):
            return rename
    by_model = {own: n for n, own in names_in_model(base.specs, base.path).items()}

    def as_loaded(name: str) -> str:
        return by_model.get(name) or by_model.get(f"{name}.weight", name).removesuffix(".weight")

    if all(_weight(as_loaded(layer), base.specs) in base.specs for layer in adapter.updates):
        return as_loaded
    missing = next(n for n in adapter.updates if _weight(n, base.specs) not in base.specs)
    raise InputError(
        f"the adapter {adapter.path} changes {missing}, which {base.path} has not: it is for another base"
        + (f" ({adapter.base})" if adapter.base else "")
    )


def _check_named_base(adapter: Adapter, name: str, base: Checkpoint) -> None:
    """Where the base that an adapter names is on this disk too, one of its tensors tells whether it is the base given."""
    named = Path(adapter.base) if adapter.base else None
    if named is None or not named.exists() or named.resolve() == base.path.resolve():
        return
    try:
        other = open_checkpoint(named)
    except (InputError, StorageError):
        return
    if name not in other.specs or not torch.equal(other.read(name), base.read(name)):
        raise InputError(f"{adapter.path} is an adapter of {named}, not of {base.path}: their {name} differ")

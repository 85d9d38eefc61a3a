"""A model on disk, whatever its format, as named tensors that are read one at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polytask.errors import InputError, StorageError
from polytask.merging.hub import fetched
from polytask.merging.matching import Spec, spec_of
from polytask.merging.safetensors_file import read_header, read_into

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the file or folder that it was opened as.
        specs: shape and dtype of every tensor.
        files: the files that hold them.
        read_into: reads one tensor by name into memory given, converting its dtype.
    """

    path: Path
    specs: Mapping[str, Spec]
    files: tuple[Path, ...]
    read_into: Callable[[str, Tensor], None]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in its own dtype or another."""
        out = torch.empty(self.specs[name].shape, dtype=dtype or self.specs[name].torch_dtype)
        self.read_into(name, out)
        return out

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(s.bytes for s in self.specs.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, a ``.pt`` file of tensors, or a folder with either, sharded or not; values are not read yet.

    Args:
        path: the file or folder, or a model's name on the hub, from where it is fetched.

    Raises:
        InputError: no model there, a file that is not what it seems, a pickle of more than tensors, an adapter.
        StorageError: a file is missing or cut short; the hub has no such model, or cannot be reached.
    """
    path = fetched(path)
    if not path.exists():
        raise StorageError(f"there is no model at {path}")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path])
    if path.suffix in PICKLES:
        return _open_pickles(path, [path])
    raise InputError(f"{path} is neither a folder nor a .safetensors or .pt file")


def _open_folder(folder: Path) -> Checkpoint:
    for index in (folder / INDEX, folder / "pytorch_model.bin.index.json"):
        if index.exists():
            named, files = _indexed(index)
            found_there = (_open_safetensors if index.name == INDEX else _open_pickles)(folder, files)
            absent = [n for n in named if n not in found_there.specs]
            if absent:
                raise StorageError(f"{index} names the tensor {absent[0]}, which none of its shards holds")
            return found_there
    found = sorted(folder.glob("*.safetensors"))
    if (folder / ADAPTER).exists():
        raise InputError(f"{folder} holds an adapter, not a whole model: it can only be an expert, beside its base")
    if (folder / SINGLE).exists() or len(found) == 1:
        return _open_safetensors(folder, [folder / SINGLE if (folder / SINGLE).exists() else found[0]])
    pickles = [p for p in (folder / "pytorch_model.bin", folder / "model.pt") if p.exists()]
    if pickles:
        return _open_pickles(folder, pickles[:1])
    several = (
        f"{len(found)} safetensors files without {INDEX}" if found else "no safetensors file and no pytorch_model.bin"
    )
    raise InputError(f"{folder} is no model: it holds {several}")


def _indexed(index: Path) -> tuple[list[str], list[Path]]:
    """The tensors that an index names, and the files that hold them."""
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = [index.parent / Path(n).name for n in sorted(set(where.values()))]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index} is not an index of shards") from None
    missing = [f for f in files if not f.exists()]
    if missing:
        raise StorageError(f"the shard {missing[0]} is missing, which {index.name} names")
    return list(where), files


def _open_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    stored = {name: s for file in files for name, s in read_header(file).items()}
    specs = {n: s.spec for n, s in stored.items()}
    return Checkpoint(path, specs, tuple(files), lambda name, out: read_into(stored[name], out))


def _open_pickles(path: Path, files: list[Path]) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _tensors_of(file)

    def read(name: str, out: Tensor) -> None:
        out.copy_(tensors[name])

    return Checkpoint(path, {n: spec_of(t) for n, t in tensors.items()}, tuple(files), read)


def _tensors_of(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        with warnings.catch_warnings():  # of a pickle's protocol, where the sentence below says what matters
            warnings.simplefilter("ignore")
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError:
        raise InputError(
            f"{file} is a pickle of more than tensors, which may run code when it is loaded: save its state dict as safetensors"
        ) from None
    except (EOFError, LookupError, RuntimeError, ValueError):
        raise StorageError(f"{file} is cut short or not a file of tensors") from None
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{file} holds a {type(loaded).__name__}, not tensors by name")
    others = [n for n, t in loaded.items() if not isinstance(t, torch.Tensor)]
    if others:
        raise InputError(f"{others[0]} in {file} is a {type(loaded[others[0]]).__name__}, not a tensor")
    return loaded


def _is_zip(file: Path) -> bool:
    # files written before PyTorch 1.6 cannot be mapped
    with file.open("rb") as f:
        return f.read(4) == b"PK\x03\x04"

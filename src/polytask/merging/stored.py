"""Named tensors in files, read one at a time when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polytask.merging.checkpoint import Checkpoint
from polytask.merging.matching import spec_of
from polytask.merging.safetensors_file import Stored, Writer, read_header, read_into

if TYPE_CHECKING:
    from torch import Tensor


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file, each read when it is asked for.

    Args:
        file: complete; only its header is read here.
    """

    def __init__(self, file: Path) -> None:
        self.header = read_header(file)

    def __getitem__(self, name: str) -> Tensor:
        return _read(self.header[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)


class CheckpointTensors(Mapping[str, "Tensor"]):
    """The tensors of a model on disk, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.specs)

    def __len__(self) -> int:
        return len(self.checkpoint.specs)


class Renamed(Mapping[str, "Tensor"]):
    """Tensors under other names.

    Args:
        tensors: what is there.
        names: {name here: name there}.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, {n: old for n, old in names.items() if old in tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class TensorFolder(MutableMapping[str, "Tensor"]):
    """Tensors that are too many for memory, one file each; a file is there completely or not at all.

    Args:
        folder: made when the first tensor comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, name: str) -> Path:
        # names of tensors may be longer than names of files
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._file(name), {name: tensor})

    def __getitem__(self, name: str) -> Tensor:
        if not self._file(name).exists():
            raise KeyError(name)
        return _read(read_header(self._file(name))[name])

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._file(name).exists()

    def __iter__(self) -> Iterator[str]:
        for file in sorted(self.folder.glob("*.safetensors")):
            yield from read_header(file)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.safetensors"))


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, which appears when it is complete."""
    with Writer(file, {n: spec_of(t) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.detach().cpu())


def _read(stored: Stored) -> Tensor:
    out = torch.empty(stored.spec.shape, dtype=stored.spec.torch_dtype)
    read_into(stored, out)
    return out

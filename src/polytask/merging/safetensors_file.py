"""The safetensors format, read and written tensor by tensor.

A file is eight bytes of header length, a JSON header, and the tensors' bytes one after another. Reading with plain file calls into
memory of our own, and writing as we go, keeps one tensor in memory; the library of that name maps or holds whole files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from polytask.errors import InputError, StorageError
from polytask.merging.matching import Spec

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
ALIGNMENT = 8
PIECE = 1 << 24
"""Bytes that are converted at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes begin, and what they mean."""

    file: Path
    start: int
    spec: Spec


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, without their values.

    Raises:
        InputError: it is not a safetensors file, or holds a dtype that PyTorch has not.
        StorageError: it is cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or not 2 <= length <= LONGEST_HEADER:
            raise InputError(f"{file} is not a safetensors file")
        if 8 + length > size:
            raise StorageError(f"{file} is cut short: its header alone takes {8 + length} bytes and it has {size}")
        try:
            header = json.loads(f.read(length))
        except ValueError:
            raise InputError(f"{file} is not a safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{file} is not a safetensors file: its header names no tensors")
    header.pop("__metadata__", None)
    found = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    end = max((s.start + s.spec.bytes for s in found.values()), default=8 + length)
    if end > size:
        last = max(found, key=lambda n: found[n].start)
        raise StorageError(
            f"{file} is cut short within the tensor {last}: {end} bytes were written and {size} are left"
        )
    return found


def _stored(file: Path, name: str, entry: Mapping[str, Any], origin: int) -> Stored:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file} is not a safetensors file: the entry of {name} in its header is incomplete") from None
    if dtype not in DTYPES:
        raise InputError(f"the tensor {name} of {file} has the dtype {dtype}, which cannot be read")
    stored = Stored(file, origin + start, Spec(shape, DTYPES[dtype]))
    if stored.spec.bytes != end - start:
        raise InputError(
            f"{file} is damaged: the tensor {name} of {stored.spec.bytes} bytes has a place of {end - start}"
        )
    return stored


def read_into(stored: Stored, out: Tensor) -> None:
    """Read a tensor into memory that is there already, converting its dtype piece by piece where it differs.

    Raises:
        StorageError: the file ends before the tensor does.
    """
    flat, spec, dtype = out.view(-1), stored.spec, stored.spec.torch_dtype
    step = spec.elements if flat.dtype == dtype else PIECE // dtype.itemsize
    with stored.file.open("rb", buffering=0) as f:
        f.seek(stored.start)
        for begin in range(0, spec.elements, max(step, 1)):
            target = flat[begin : begin + step]
            raw = target if target.dtype == dtype else torch.empty(len(target), dtype=dtype)
            _fill(f, raw, stored)
            if raw is not target:
                target.copy_(raw)


def _fill(f: Any, raw: Tensor, stored: Stored) -> None:
    view = raw.view(torch.uint8).numpy().data.cast("B")
    while len(view):
        got = f.readinto(view)
        if not got:
            raise StorageError(f"{stored.file} ends in the middle of a tensor: it was cut short while it was read")
        view = view[got:]


class Writer:
    """Writes one safetensors file, tensor after tensor in the order announced; it appears under its name only when complete.

    Args:
        file: where it will be.
        specs: the tensors to come, in order.
    """

    def __init__(self, file: Path, specs: Mapping[str, Spec]) -> None:
        self.file, self.partial = file, file.with_name(file.name + ".partial")
        self.waiting: Iterator[tuple[str, Spec]] = iter(specs.items())
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        entries: dict[str, Any] = dict(header)
        for name, spec in specs.items():
            end = offset + spec.bytes
            entries[name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.total = 8 + len(text) + offset
        self.stream = self.partial.open("wb")
        self.stream.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        expected, spec = next(self.waiting)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, spec.shape, spec.torch_dtype)
        self.stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()
        if kind is None:
            os.replace(self.partial, self.file)
        else:
            self.partial.unlink(missing_ok=True)


def shards(specs: Mapping[str, Spec], limit: int) -> dict[str, dict[str, Spec]]:
    """Divide tensors into files of at most ``limit`` bytes (a larger tensor gets a file of its own), named as transformers does."""
    parts: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if parts[-1] and filled + spec.bytes > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = spec
        filled += spec.bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def index_of(files: Mapping[str, Iterable[str]], total: int) -> str:
    """The text of ``model.safetensors.index.json``: which file holds which tensor."""
    where = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"

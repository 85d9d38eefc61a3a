"""One file a checkpoint: a tree of tensors and plain values as safetensors, written all or not at all; no pickle anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask.errors import StorageError

FORMAT = "polytask-checkpoint-1"


def save_checkpoint(path: Path, tree: Any) -> None:
    """Write a tree beside ``path``, flush it to the disk, then put it in place in one move.

    Whatever happens on the way, SIGKILL and a full disk included, ``path`` holds either the old tree or the new one.

    Args:
        path: the file; its folder is made where it is missing.
        tree: nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, booleans and None.

    Raises:
        StorageError: the file cannot be written; the former one is untouched.
        TypeError: the tree holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shape, tensors = take_apart(tree)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata={"format": FORMAT, "tree": shape})
        _flush(temporary)
        os.replace(temporary, path)
        temporary = None
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        kept = "; the checkpoint before it is intact" if path.exists() else ""
        raise StorageError(f"the checkpoint {path} cannot be written ({error}){kept}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def load_checkpoint(path: Path) -> Any:
    """Read back what :func:`save_checkpoint` wrote, tensors on the CPU, bit by bit the same.

    Raises:
        StorageError: no such file, or one that is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise StorageError(f"{path} is not a checkpoint of this version of polytask")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return put_together(metadata["tree"], tensors)
    except FileNotFoundError as error:
        raise StorageError(f"there is no checkpoint {path}") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the checkpoint {path} is damaged ({error})") from error


def take_apart(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """A tree as a JSON text and the tensors it names, which any format can hold.

    Raises:
        TypeError: the tree holds something else than tensors, arrays, numbers, strings, dicts, lists and tuples.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_take_apart(tree, tensors), separators=(",", ":")), tensors


def put_together(shape: str, tensors: dict[str, Tensor]) -> Any:
    """The tree that :func:`take_apart` was given."""
    return _put_together(json.loads(shape), tensors)


def clear_unfinished(path: Path) -> None:
    """Remove what a killed process left beside ``path``."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            left.unlink()


def generator_states() -> dict[str, Any]:
    """The states of python's, numpy's and torch's global random generators."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_generators(state: dict[str, Any]) -> None:
    """Go on with the random numbers where :func:`generator_states` was called."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON with every tensor replaced by its name; what JSON lacks is written as {"kind": content}."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value.detach()
        # a copy, since safetensors refuses tensors that share memory and strided views
        tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_take_apart(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_take_apart(v, tensors) for v in value]
    raise TypeError(f"a checkpoint holds tensors, arrays, numbers and strings, not {type(value).__name__}")


def _put_together(shape: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(shape, list):
        return [_put_together(v, tensors) for v in shape]
    if not isinstance(shape, dict):
        return shape
    ((kind, content),) = shape.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_put_together(v, tensors) for v in content)
    return {_put_together(k, tensors): _put_together(v, tensors) for k, v in content}

"""The IDX format of MNIST and its relatives: a header of dimensions, then the bytes."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError, StorageError

Array = npt.NDArray[Any]
UNSIGNED_BYTE = 0x08
PARTS = ("train-", "t10k-", "")


def read_idx(path: Path) -> Array:
    """Read one IDX file of unsigned bytes, also compressed with gzip.

    Raises:
        InputError: no such file, or another format.
        StorageError: the file is truncated or damaged.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(f"the file {path.name} is truncated or damaged: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != UNSIGNED_BYTE:
        raise InputError(f"{path.name} is no IDX file of unsigned bytes, the format of MNIST")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:start], ">i4").tolist()
    if len(raw) != start + int(np.prod(shape)):
        raise StorageError(f"the file {path.name} is truncated or damaged: it does not hold {shape} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_images(folder: Path, part: str = "") -> tuple[Array, Array] | None:
    """Images (rows, height, width) and labels (rows,) of a folder, named as MNIST's are.

    Args:
        folder: holds ``{part}images-idx3-ubyte`` and ``{part}labels-idx1-ubyte``, each also with ``.gz``.
        part: ``train-``, ``t10k-`` or empty.

    Returns:
        None where the folder has no such part.

    Raises:
        InputError: images without labels, or of another number.
    """
    found = [
        next((p for end in (".gz", "") if (p := folder / f"{part}{name}{end}").is_file()), None)
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    if found == [None, None]:
        return None
    if found[0] is None or found[1] is None:
        raise InputError(f"{folder} holds only one of {part}images-idx3-ubyte and {part}labels-idx1-ubyte")
    images, labels = read_idx(found[0]), read_idx(found[1])
    if images.ndim != 3 or labels.shape != (len(images),):
        raise InputError(f"{folder} holds images of shape {images.shape} and labels of shape {labels.shape}")
    return images, labels


def is_image_folder(path: Path) -> bool:
    """Whether the folder holds images in this format."""
    return path.is_dir() and any(path.glob("*images-idx3-ubyte*"))

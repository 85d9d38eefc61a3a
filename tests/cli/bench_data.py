"""Images so simple that they are learnt within an epoch, in the files of MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray) -> None:
    """One IDX file of bytes."""
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())


def image_folder(folder: Path, shuffled_test: bool = False) -> Path:
    """Three classes of noisy bars, 240 to train and 120 to test on; the test labels shuffled when asked for."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, n in (("train-", 240), ("t10k-", 120)):
        labels = rng.integers(0, 3, n).astype(np.uint8)
        images = rng.integers(0, 120, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 7 * label : 10 + 7 * label, 4:24] = 250
        if shuffled_test and part == "t10k-":
            labels = rng.permutation(labels)
        write_idx(folder / f"{part}images-idx3-ubyte", images)
        write_idx(folder / f"{part}labels-idx1-ubyte", labels)
    return folder

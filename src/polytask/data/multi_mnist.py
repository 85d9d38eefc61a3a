"""MultiMNIST: two images on one canvas, one task each.

Sources: Sabour, Frosst and Hinton 2017 (arXiv:1710.09829) overlaid digits; Sener and Koltun 2018 (arXiv:1810.04650) made
two tasks of it, the digit at the upper left and the one at the lower right; Lin et al. 2019 (arXiv:1912.12854) put garments beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError

Array = npt.NDArray[Any]
CANVAS = 36


@dataclass(frozen=True)
class Pairs:
    """Overlaid pairs.

    Attributes:
        images: (rows, canvas, canvas), uint8.
        left: the label of the image at the upper left, (rows,), int64.
        right: the label of the image at the lower right.
    """

    images: Array
    left: Array
    right: Array

    def __len__(self) -> int:
        return len(self.images)


def overlay_pairs(
    left: tuple[Array, Array], right: tuple[Array, Array] | None = None, *, rows: int, seed: int, canvas: int = CANVAS
) -> Pairs:
    """Draw images in pairs and overlay them at opposite corners, where both are bright the brighter pixel showing.

    No image is used again in the same corner before every one has been used there once; where both corners draw from the same images, no
    image is used twice at all while they last, so that rows of half as many pairs as there are images are independent.

    Args:
        left: images (n, height, width) of uint8 and labels (n,) for the upper left corner.
        right: the same for the lower right corner; from the same images when omitted.
        rows: how many pairs.
        seed: of the draw.
        canvas: height and width of the result, 36 in the literature.

    Raises:
        InputError: no image, images larger than the canvas, or no rows asked for.
    """
    for images, labels in (left, right or left):
        if not len(images) or len(images) != len(labels):
            raise InputError(
                f"pairs need images with one label each, not {len(images)} images and {len(labels)} labels"
            )
        if max(images.shape[1:]) > canvas:
            raise InputError(f"images of {images.shape[1]} x {images.shape[2]} do not fit a canvas of {canvas}")
    if rows < 1:
        raise InputError(f"at least one pair must be asked for, not {rows}")
    rng = np.random.default_rng(seed)
    if right is None:
        drawn = _passes(len(left[0]), 2 * rows, rng).reshape(2, rows)
        upper, lower, right = drawn[0], drawn[1], left
    else:
        upper, lower = _passes(len(left[0]), rows, rng), _passes(len(right[0]), rows, rng)
    made = np.zeros((rows, canvas, canvas), np.uint8)
    height, width = left[0].shape[1:]
    made[:, :height, :width] = left[0][upper]
    height, width = right[0].shape[1:]
    corner = made[:, canvas - height :, canvas - width :]
    np.maximum(corner, right[0][lower], out=corner)
    return Pairs(made, left[1][upper].astype(np.int64), right[1][lower].astype(np.int64))


def _passes(n: int, wanted: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Indices below n, each once in every n."""
    return np.concatenate([rng.permutation(n) for _ in range(-(-wanted // n))])[:wanted]

"""The rows of a study made of overlaid images: two tasks, the image at the upper left and the one at the lower right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.data import Split
from polytask.data.idx import read_images
from polytask.data.multi_mnist import Pairs, overlay_pairs
from polytask.errors import InputError
from polytask.tasks import Multiclass, Task, Tasks
from polytask.training.jobs import StudyData
from polytask.training.study_table import PARTS, StudyRows

Array = npt.NDArray[Any]
Labelled = tuple[Array, Array]


@dataclass(frozen=True)
class ImagePairs(StudyRows):
    """Pairs of images, those of each part drawn from images that no other part has.

    Attributes:
        images: (rows, height, width), uint8.
    """

    images: Array

    @classmethod
    def of(
        cls, folder: Path, right: Path | None, rows: int, fractions: tuple[float, float, float], seed: int
    ) -> ImagePairs:
        """Draw the pairs.

        Args:
            folder: of images as MNIST's; where it has a test part, test pairs are drawn from that.
            right: another such folder, for the image at the lower right.
            rows: how many pairs, all parts together.
            fractions: shares of training, validation and test pairs.
            seed: of the draw.

        Raises:
            InputError: a folder without images, or too few pairs for three parts.
        """
        sizes = [round(rows * fraction) for fraction in fractions]
        if min(sizes) < 1:
            raise InputError(f"{rows} pairs are too few for training, validation and test")
        sources = [_parts(place, fractions, seed) for place in (folder, right) if place is not None]
        drawn = [
            overlay_pairs(*(s[part] for s in sources), rows=size, seed=seed + k)
            for k, (part, size) in enumerate(zip(PARTS, sizes, strict=True))
        ]
        train, validation, test = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        split = Split(train, validation, test, "each part's pairs are drawn from images that no other part has")
        targets = {side: np.concatenate([getattr(p, side) for p in drawn]) for side in ("left", "right")}
        return cls(_tasks(drawn), split, targets, None, np.concatenate([p.images for p in drawn]))

    def encode(self) -> StudyData:
        """What trainings are given."""
        spec = {"image": list(self.images.shape[1:]), "features": {"image": 1}, "columns": ["image"]}
        return self.study_data({part: {"image": self.images[self.rows(part)]} for part in PARTS}, spec)

    def describe(self, source: str) -> dict[str, Any]:
        """Where the pairs came from and what is in them: a run on others is not resumed."""
        digest = hashlib.sha256(self.images.tobytes())
        for labels in self.targets.values():
            digest.update(labels.tobytes())
        return {"source": source, "rows": len(self), "columns": 1, "sha256": digest.hexdigest()}


def _parts(folder: Path, fractions: tuple[float, float, float], seed: int) -> Mapping[str, Labelled]:
    """{part: images and labels}, no image in two parts."""
    test = read_images(folder, "t10k-")
    rest = read_images(folder, "train-") or (None if test else read_images(folder))
    if rest is None:
        raise InputError(f"{folder} holds no images-idx3-ubyte files, the format of MNIST")
    order = np.random.default_rng([seed, len(rest[0])]).permutation(len(rest[0]))
    shares = np.cumsum(fractions[:2] if test is None else np.array(fractions[:2]) / sum(fractions[:2]))
    cut = np.split(order, np.round(shares * len(order)).astype(int))
    found = {part: (rest[0][i], rest[1][i]) for part, i in zip(PARTS, cut, strict=True)}
    return found if test is None else {**found, "test": test}


def _tasks(drawn: list[Pairs]) -> Tasks:
    made = []
    for side in ("left", "right"):
        labels = np.concatenate([getattr(p, side) for p in drawn])
        n = int(labels.max()) + 1
        made.append(Task(side, Multiclass(n), classes=tuple(str(c) for c in range(n))))
    return Tasks(made)

"""Real images, sounds and sentences as the tasks that ``benchmarks/experts.py`` fine-tunes on; read from a folder of data sets.

Every picture is 28 x 28, grey, in [0, 1]; sounds are log-spectrograms of that size. A task has rows to train on, to choose by (validation)
and to report (test); official splits are kept where there are any, and actors of the emotional speech are in one part only.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import wave
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SIDE = 28
MOST = {"train": 2000, "validation": 400, "test": 1000}
MOST_TEXTS = {"train": 2000, "validation": 100, "test": 250}
PARTS = tuple(MOST)

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: ``parts[name]`` holds inputs and labels of train, validation and test."""

    name: str
    classes: int
    parts: dict[str, Labelled]


def image_tasks(data: Path) -> list[Task]:
    """Eight tasks on digits, garments, spoken digits (two), emotional speech, two alphabets and cell nuclei."""
    sounds, facts = spoken_digits(data)
    digits, speakers = (torch.tensor(labels) for labels in zip(*((d, s) for d, s, _ in facts), strict=True))
    official = torch.tensor([index < 5 for _, _, index in facts])
    return [
        mnist(data),
        task("fashion", *idx_pair(data / "fashion_mnist_mini", ""), 10),
        task("spoken_digit", sounds, digits, 10, held_out=official),
        task("speaker", sounds, speakers, 6, held_out=official),
        emotional_speech(data),
        *(task(name, *alphabet(data, letters)) for name, letters in ALPHABETS.items()),
        nuclei(data),
    ]


ALPHABETS = {"katakana": "Japanese_(katakana)", "korean": "Korean"}
"""The alphabets that are tasks; the others are what the base is trained on."""


def background(data: Path) -> Labelled:
    """Characters of the alphabets that are no task, one class a character."""
    found = {n: alphabet(data, n) for n in ("Balinese", "Early_Aramaic", "Greek", "Latin", "Sanskrit", "Tagalog")}
    images, labels, start = [], [], 0
    for pictures, classes, count in found.values():
        images.append(pictures)
        labels.append(classes + start)
        start += count
    return torch.cat(images), torch.cat(labels)


def task(
    name: str,
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    held_out: Tensor | None = None,
    most: Mapping[str, int] = MappingProxyType(MOST),
) -> Task:
    """Split rows 60 : 15 : 25 within each class, or take the rows held out as test rows and 4 : 1 of the others."""
    g = torch.Generator().manual_seed(0)
    where = torch.empty(len(labels), dtype=torch.long)
    edges = (0.6, 0.75) if held_out is None else (0.8, 1.0)
    for c in labels.unique():
        rows = (labels == c if held_out is None else (labels == c) & ~held_out).nonzero()[:, 0]
        place = torch.randperm(len(rows), generator=g) / len(rows)
        where[rows] = (place >= edges[0]).long() + (place >= edges[1]).long()
    if held_out is not None:
        where[held_out] = 2
    parts = {p: (inputs[where == i], labels[where == i]) for i, p in enumerate(PARTS)}
    return Task(name, classes, {p: thinned(x, y, most[p], g) for p, (x, y) in parts.items()})


def thinned(inputs: Tensor, labels: Tensor, most: int, g: torch.Generator) -> Labelled:
    rows = torch.randperm(len(labels), generator=g)[:most]
    return inputs[rows].contiguous(), labels[rows]


def idx(path: Path) -> Tensor:
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def idx_pair(folder: Path, part: str) -> Labelled:
    pictures = idx(folder / f"{part}images-idx3-ubyte.gz")
    return pictures[:, None] / 255, idx(folder / f"{part}labels-idx1-ubyte.gz").long()


def mnist(data: Path) -> Task:
    train, test = (idx_pair(data / "mnist", part) for part in ("train-", "t10k-"))
    held_out = torch.cat([torch.zeros(len(train[1])), torch.ones(len(test[1]))]).bool()
    return task("mnist", torch.cat([train[0], test[0]]), torch.cat([train[1], test[1]]), 10, held_out)


def spectrogram(wave: npt.NDArray[np.float32]) -> Tensor:
    """The logarithm of a sound's power, 28 bands of frequency by 28 stretches of its duration."""
    x = torch.from_numpy(wave)
    power = torch.stft(x, 256, 64, window=torch.hann_window(256), return_complex=True).abs().square()
    image = adaptive_avg_pool2d((power + 1e-6).log()[None], (SIDE, SIDE)).flip(1)
    return (image - image.min()) / (image.max() - image.min())


def spoken_digits(data: Path) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Spectrograms, and of each the digit, the speaker's number and the recording's."""
    images, facts, speakers = [], [], dict[str, int]()
    with zipfile.ZipFile(data / "fsdd/recordings.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".wav")):
            digit, speaker, index = Path(name).stem.split("_")
            with wave.open(io.BytesIO(archive.read(name))) as sound:
                raw = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
            images.append(spectrogram(raw.astype(np.float32) / 32768))
            facts.append((int(digit), speakers.setdefault(speaker, len(speakers)), int(index)))
    return torch.stack(images), facts


def emotional_speech(data: Path) -> Task:
    """Which of ten sentences was spoken; two men and two women are heard in the test alone."""
    import soundfile

    rows = list(csv.DictReader((data / "emodb/labels.csv").open(encoding="utf-8")))
    sentences = sorted({r["text_code"] for r in rows})
    images = []
    with zipfile.ZipFile(data / "emodb/audio_8k_flac.zip") as archive:
        inside = {Path(n).stem: n for n in archive.namelist()}
        for row in rows:
            sound, _ = soundfile.read(io.BytesIO(archive.read(inside[Path(row["file"]).stem])), dtype="float32")
            images.append(spectrogram(sound))
    labels = torch.tensor([sentences.index(r["text_code"]) for r in rows])
    unheard = torch.tensor([r["speaker"] in ("11", "12", "13", "14") for r in rows])
    return task("sentence", torch.stack(images), labels, len(sentences), held_out=unheard)


def alphabet(data: Path, name: str) -> tuple[Tensor, Tensor, int]:
    """Ink of the characters of one alphabet, their numbers, and how many there are."""
    from PIL import Image

    images, labels = [], []
    for k in (1, 2):
        with zipfile.ZipFile(data / f"omniglot/images_background_small{k}.zip") as archive:
            for path in sorted(n for n in archive.namelist() if f"/{name}/" in n and n.endswith(".png")):
                ink = 1 - np.asarray(Image.open(io.BytesIO(archive.read(path))), dtype=np.float32)
                images.append(pooled(torch.from_numpy(ink)))
                labels.append(int(Path(path).parent.name.removeprefix("character")) - 1)
        if labels:  # two alphabets are in both files
            break
    return (2 * torch.stack(images)).clamp(0, 1), torch.tensor(labels), max(labels) + 1


def nuclei(data: Path) -> Task:
    """How crowded a microscope's picture is: four classes of equal size by the number of cell nuclei."""
    from PIL import Image

    rows = list(csv.DictReader((data / "nuclei/index.csv").open(encoding="utf-8")))
    with zipfile.ZipFile(data / "nuclei/nuclei128.zip") as archive:
        inside = {Path(n).stem: n for n in archive.namelist() if "images/" in n and n.endswith(".png")}
        images = [
            pooled(
                torch.from_numpy(
                    np.asarray(Image.open(io.BytesIO(archive.read(inside[r["name"]]))).convert("L"), np.float32) / 255
                )
            )
            for r in rows
        ]
    counts = torch.tensor([float(r["n_nuclei"]) for r in rows])
    return task(
        "nuclei", torch.stack(images), torch.bucketize(counts, counts.quantile(torch.tensor([0.25, 0.5, 0.75]))), 4
    )


def pooled(picture: Tensor) -> Tensor:
    return adaptive_avg_pool2d(picture[None], (SIDE, SIDE))


Encode = Callable[[list[str]], Tensor]


def text_tasks(data: Path, encode: Encode) -> list[Task]:
    """Four tasks on sentences: what a voice assistant is asked, in which room of life, what a review is of, how a sentence feels."""
    return [
        text_task(name, list(rows(data)), encode)
        for name, rows in {"intent": snips, "scenario": home, "department": reviews, "valence": emotions}.items()
    ]


def text_task(name: str, rows: list[tuple[str, str]], encode: Encode) -> Task:
    names = sorted({label for _, label in rows})
    labels = torch.tensor([names.index(label) for _, label in rows])
    return task(name, encode([text for text, _ in rows]), labels, len(names), most=MOST_TEXTS)


def snips(data: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(data / "snips/snips_2017_06.zip") as archive:
        for name in sorted(n for n in archive.namelist() if Path(n).name.startswith("train_")):
            raw = archive.read(name)
            found = json.loads(raw.decode("latin-1" if "PlayMusic" in name else "utf-8"))
            for intent, queries in found.items():
                yield from (("".join(part["text"] for part in q["data"]), intent) for q in queries)


def home(data: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(data / "nlu_home/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from ((row["text"], row["scenario"]) for row in map(json.loads, lines))


def reviews(data: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(data / "clothing_reviews/reviews.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["Review Text"] and row["Department Name"]:
                yield row["Review Text"], row["Department Name"]


def emotions(data: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(data / "emobank/emobank.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            valence = float(row["V"])
            if row["text"] and not 2.8 < valence < 3.2:  # the middle is neither
                yield row["text"], "pleasant" if valence > 3 else "unpleasant"

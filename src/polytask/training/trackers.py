"""Where the figures of each epoch go: JSON lines and CSV always, TensorBoard when asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from polytask.errors import InputError, MissingExtraError, StorageError

Row = Mapping[str, float | None]


class Tracker(Protocol):
    """Anything that wants to be told the figures of each epoch.

    Names are ``task/metric``: ``income/train_loss``, ``income/weight``, ``income/gradient_norm``, ``income/roc_auc``, and ``epoch``,
    ``score``, ``seconds``; None where a figure is unknown.
    """

    def start(self, rows: Sequence[Row]) -> None:
        """Begin with the epochs already done: none in a new run, those of the checkpoint in a resumed one."""

    def log(self, row: Row) -> None:
        """Take the figures of one more epoch."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines:
    """One JSON object an epoch, in ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, rows: Sequence[Row]) -> None:
        _write(self.path, "w", "".join(json.dumps(dict(row)) + "\n" for row in rows))

    def log(self, row: Row) -> None:
        _write(self.path, "a", json.dumps(dict(row)) + "\n")

    def close(self) -> None:
        return None


class Csv:
    """One line an epoch, in ``metrics.csv``, empty where a figure is unknown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header_written = False

    def start(self, rows: Sequence[Row]) -> None:
        _write(self.path, "w", "")
        self._header_written = False
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        lines = [] if self._header_written else [list(row)]
        lines.append(["" if v is None else str(v) for v in row.values()])
        self._header_written = True
        _write(self.path, "a", lines)

    def close(self) -> None:
        return None


class TensorBoard:
    """Event files for TensorBoard.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("the TensorBoard log", "tensorboard") from error
        self._open = SummaryWriter
        self.folder = folder
        self._writer: Any = None

    def start(self, rows: Sequence[Row]) -> None:
        # purge_step hides what a killed run had written past its checkpoint
        self._writer = self._open(str(self.folder), purge_step=len(rows) + 1)

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if value is not None and name != "epoch":
                self._writer.add_scalar(name, value, int(row["epoch"] or 0))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def open_trackers(asked: Iterable[str | Tracker], folder: Path | None) -> list[Tracker]:
    """The trackers of a run: JSON lines and CSV where there is a folder, and those asked for by name or given.

    Raises:
        InputError: an unknown name, or one that needs a folder where none is given.
        MissingExtraError: the named tracker is not installed.
    """
    found: list[Tracker] = [] if folder is None else [JsonLines(folder / "metrics.jsonl"), Csv(folder / "metrics.csv")]
    for one in asked:
        if not isinstance(one, str):
            found.append(one)
        elif one != "tensorboard":
            raise InputError(
                f"there is no tracker called {one!r}; there is tensorboard, or any object with start, log and close"
            )
        elif folder is None:
            raise InputError("the tracker tensorboard needs a folder to write to")
        else:
            found.append(TensorBoard(folder / "tensorboard"))
    return found


def _write(path: Path, mode: str, content: str | list[list[str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, newline="", encoding="utf-8") as file:
            if isinstance(content, str):
                file.write(content)
            else:
                csv.writer(file).writerows(content)
    except OSError as error:
        raise StorageError(f"the log {path} cannot be written ({error})") from error

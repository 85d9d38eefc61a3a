"""The rows of a study: their tasks, their split, their labels; and those of a table, with its encoded features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polytask.data import Split, TableEncoder, encode_targets, infer_tasks, split_rows
from polytask.data.encode import check_features
from polytask.data.targets import check_columns, fit_scales
from polytask.errors import InputError
from polytask.tasks import Tasks
from polytask.training.jobs import StudyData
from polytask.training.judging import labelled
from polytask.training.protocol import Settings

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class StudyRows:
    """The rows of a study, whatever they are rows of.

    Attributes:
        tasks: what is learnt, their scales taken from training rows.
        split: rows of training, validation and test.
        targets: labels of all rows.
        clusters: one label a row where rows belong together, else None.
    """

    tasks: Tasks
    split: Split
    targets: Mapping[str, Array]
    clusters: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.targets.values())))

    def rows(self, part: str) -> npt.NDArray[np.int64]:
        """Row positions of ``train``, ``validation`` or ``test``."""
        found: npt.NDArray[np.int64] = getattr(self.split, part)
        return found

    def labels(self, part: str) -> dict[str, Array]:
        """{task: labels} of a part."""
        return {n: y[self.rows(part)] for n, y in self.targets.items()}

    def clusters_of(self, part: str) -> Array | None:
        """Labels of the rows that belong together."""
        return None if self.clusters is None else self.clusters[self.rows(part)]

    def label_counts(self, task: str) -> dict[str, int]:
        """How many labels a task has in each part."""
        return {part: int(labelled(self.targets[task][self.rows(part)]).sum()) for part in PARTS}

    def missing(self) -> dict[str, float]:
        """The share of rows without a label, of each task."""
        return {n: float(1 - labelled(y).mean()) for n, y in self.targets.items()}

    def study_data(self, inputs: Mapping[str, Mapping[str, Array]], spec: Mapping[str, Any]) -> StudyData:
        """What trainings are given: the inputs of every part, and no test labels."""
        targets = {part: self.labels(part) for part in PARTS[:2]}
        return StudyData(inputs, targets, spec, self.tasks.to_json())


@dataclass(frozen=True)
class StudyTable(StudyRows):
    """A table read for a study.

    Attributes:
        frame: the table.
        features: the table without targets and columns that are no features.
    """

    frame: pd.DataFrame
    features: pd.DataFrame

    @classmethod
    def of(cls, frame: pd.DataFrame, settings: Settings) -> StudyTable:
        """Infer the tasks and cut the rows.

        Raises:
            InputError: a target or column that cannot be used.
        """
        check_columns(frame, settings.ignore, "ignored")
        tasks = infer_tasks(frame, settings.targets, settings.kinds)
        split = split_rows(
            frame,
            tasks,
            seed=settings.split_seed,
            fractions=settings.fractions,
            by=settings.by,
            by_time=settings.by_time,
        )
        tasks = fit_scales(frame.iloc[split.train], tasks)
        features = frame.drop(columns=[*settings.targets, *not_features(settings)])
        if not features.shape[1]:
            raise InputError("there is no feature column: every column is a target or left out")
        check_features(features)
        clusters = None if settings.by is None else frame[settings.by].astype(str).to_numpy()
        return cls(tasks, split, encode_targets(frame, tasks), clusters, frame, features)

    def encode(self, folder: Path) -> tuple[TableEncoder, StudyData]:
        """The encoder, fitted on training rows once and kept in ``folder``, and what it makes of the table."""
        if (folder / "encoder.skops").exists():
            encoder = TableEncoder.load(folder)
        else:
            encoder = TableEncoder().fit(self.features.iloc[self.split.train])
            encoder.save(folder)
        inputs: dict[str, dict[str, Array]] = {}
        for part in PARTS:
            found = encoder.transform(self.features.iloc[self.rows(part)])
            inputs[part] = {"numeric": found.numeric, "categorical": found.categorical}
        return encoder, self.study_data(inputs, encoder.spec)


def not_features(settings: Settings) -> list[str]:
    """Columns that are neither features nor targets."""
    extra = [*settings.ignore, *([settings.by] if settings.by is not None else [])]
    return [c for c in dict.fromkeys(extra) if c not in settings.targets]

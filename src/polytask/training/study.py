"""A table with several targets -> should they be learnt together, and how: one budget, several seeds, one look at the test rows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polytask.errors import InputError
from polytask.training.findings import results_of
from polytask.training.jobs import StudyProgress, Workshop, load_weights
from polytask.training.prediction import Part, Predictor, conformal_scores, save_model
from polytask.training.prediction import predict as predict
from polytask.training.protocol import Settings, balancing_methods
from polytask.training.run_folder import (
    LOGS,
    MODEL,
    WORK,
    config_of,
    describe_data,
    open_folder,
    read_config,
    read_results,
    write_results,
)
from polytask.training.search import Search
from polytask.training.study_table import StudyTable, not_features

if TYPE_CHECKING:
    import pandas as pd

DIAGNOSES = 10


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        folder: of the run.
        results: what ``results.json`` holds, described in ``docs/results.md``.
    """

    folder: Path
    results: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return str(self.results["verdict"]["text"])

    def predict(self, frame: pd.DataFrame, intervals: float | None = None) -> pd.DataFrame:
        """See :func:`polytask.training.predict`."""
        return Predictor(self.folder).predict(frame, intervals)


def run_study(
    frame: pd.DataFrame,
    targets: Sequence[str],
    *,
    out: Path | str,
    kinds: Mapping[str, str] | None = None,
    by: str | None = None,
    by_time: str | None = None,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    ignore: Sequence[str] = (),
    balance: str | Sequence[str] = "auto",
    seeds: int | Sequence[int] | None = None,
    epochs: int | None = None,
    trials: int | None = None,
    quick: bool = False,
    grouping: bool = True,
    split_seed: int = 0,
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    source: str = "",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[StudyProgress], None] | None = None,
) -> Study:
    """Find out whether several targets of one table should be learnt together, and leave the best model.

    Single-task references, equal weighting, a tuned scalarization and the balancing methods get the same network and the same epochs; where
    learning all together hurts a task on validation rows, groups of tasks are tried. Everything is chosen on validation rows; the test
    rows are looked at once, at the end.

    Args:
        frame: features and targets, one row an example; missing labels are NaN.
        targets: at least two target columns.
        out: the run folder, described in ``docs/results.md``.
        kinds: {target: kind} where it is not to be inferred.
        by: a column whose groups the split keeps together; no feature.
        by_time: a column to split by; the test rows are the latest.
        fractions: shares of training, validation and test rows.
        ignore: columns that are neither features nor targets.
        balance: ``auto``, a method's name, several, or several between commas.
        seeds: how many, or which; 3 when omitted, 2 when quick.
        epochs: at most, of each training; 40 when omitted, 15 when quick.
        trials: weight vectors tried for the tuned scalarization; 5 when omitted, 3 when quick.
        quick: a smaller study, to see whether everything fits; its intervals are honest and wide.
        grouping: whether groups of tasks may be tried.
        split_seed: of the split.
        model: options of :func:`polytask.models.tabular.tabular_model`.
        training: settings of :class:`~polytask.training.config.TrainConfig` that replace the study's own.
        source: what to call the table in the results.
        workers: trainings at a time; at most 2 processors are taken when omitted. Results do not depend on it.
        resume: go on with an interrupted run in ``out``; a finished one is returned as it is.
        overwrite: replace a run in ``out``.
        progress: told of every finished training.

    Raises:
        InputError: a table, target, option or folder that cannot be used, before any training.
        TrainingError: a training diverged; the message names task, epoch and step.
        StorageError: the folder cannot be written.
    """
    named = [balance] if isinstance(balance, str) else list(balance)
    settings = Settings(
        targets=tuple(targets),
        kinds=dict(kinds or {}),
        fractions=fractions,
        by=by,
        by_time=by_time,
        ignore=tuple(ignore),
        balance=tuple(name.strip() for part in named for name in part.split(",")),
        seeds=_seeds(seeds, quick),
        split_seed=split_seed,
        trials=(3 if quick else 5) if trials is None else trials,
        short=quick,
        grouping=grouping,
        model=dict(model or {}),
        training={
            **_training(len(frame), quick),
            **({"epochs": epochs} if epochs is not None else {}),
            **(training or {}),
        },
    )
    return _run(frame, settings, Path(out), source, workers, resume, overwrite, progress)


def replay(
    config: Path | str,
    frame: pd.DataFrame,
    *,
    out: Path | str,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[StudyProgress], None] | None = None,
) -> Study:
    """Run the study of a ``config.yaml`` again on the same table: the same results, but for the seconds.

    Raises:
        InputError: the table is not the one of the config.
    """
    then = read_config(Path(config))
    if describe_data(frame, "")["sha256"] != then["data"].get("sha256"):
        raise InputError(
            f"the table is not the one that {config} was made with: {then['data'].get('source') or 'its rows differ'}"
        )
    settings = Settings.from_json(then["study"])
    return _run(frame, settings, Path(out), then["data"]["source"], workers, resume, overwrite, progress)


def load_run(folder: Path | str) -> Study:
    """A finished run, as :func:`run_study` left it.

    Raises:
        InputError: there is no finished run.
        StorageError: its results are damaged.
    """
    return Study(Path(folder), read_results(Path(folder)))


def _seeds(seeds: int | Sequence[int] | None, quick: bool) -> tuple[int, ...]:
    if seeds is None:
        seeds = 2 if quick else 3
    return tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)


def _training(rows: int, quick: bool) -> dict[str, Any]:
    """Settings that suit the size of the table: some 25 steps an epoch, early stopping."""
    batch = int(2 ** np.clip(np.round(np.log2(max(rows, 1) / 40)), 5, 10))
    return {"epochs": 15 if quick else 40, "patience": 4 if quick else 5, "batch_size": batch}


def _run(
    frame: pd.DataFrame,
    settings: Settings,
    out: Path,
    source: str,
    workers: int | None,
    resume: bool,
    overwrite: bool,
    progress: Callable[[StudyProgress], None] | None,
) -> Study:
    began = time.perf_counter()
    config = config_of(settings.to_json(), describe_data(frame, source))
    table = StudyTable.of(frame, settings)
    methods = balancing_methods(settings.balance, len(table.tasks), short=settings.short)
    if open_folder(out, config, resume=resume, overwrite=overwrite):
        return load_run(out)
    work = out / WORK
    encoder, data = table.encode(work)
    every = max(1, settings.config.epochs // DIAGNOSES)
    count = workers or min(2, os.cpu_count() or 1)
    workshop = Workshop(data, settings.config.but(observe_every=every), settings.model, work, count, progress)
    search = Search(table, settings, workshop, methods)
    search.run()
    workshop.announce("judging on the test rows")
    bench = search.bench("test")
    parts, scores = final_model(search, table, settings)
    save_model(out / MODEL, parts, table.tasks, encoder, scores, not_features(settings))
    workshop.keep_logs(out / LOGS)
    write_results(out, results_of(table, settings, search, bench, encoder.spec, source, time.perf_counter() - began))
    shutil.rmtree(work)
    return load_run(out)


def final_model(search: Search, table: StudyTable, settings: Settings) -> tuple[list[Part], dict[str, Any]]:
    """The networks to keep, for each group that of the seed with the best validation score; and their conformal scores."""
    parts, scores = [], {}
    labels = table.labels("validation")
    for i, group in enumerate(search.chosen.groups):
        outcome = max((search.outcomes(search.chosen, s)[i] for s in settings.seeds), key=lambda o: o.score)
        mine = table.tasks.only([search.names[k] for k in group])
        parts.append(Part(tuple(mine), outcome.options, load_weights(outcome)))
        for name, task in mine.items():
            found = conformal_scores(task, labels[name], outcome.validation[name]["prediction"])
            if found is not None:
                scores[name] = found
    return parts, scores

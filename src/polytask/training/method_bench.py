"""The quality of many balancing methods on real data, under one budget: what ``polytask bench methods`` runs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polytask.errors import InputError
from polytask.registry import find, methods
from polytask.training.comparison import compare
from polytask.training.findings import results_of
from polytask.training.image_pairs import ImagePairs
from polytask.training.jobs import StudyData, StudyProgress, Workshop
from polytask.training.method_search import MethodSearch, learning_rates
from polytask.training.protocol import LOG_LOSSES, Method, Settings, balancing_methods
from polytask.training.run_folder import (
    CONFIG,
    LOGS,
    WORK,
    config_of,
    describe_data,
    open_folder,
    read_config,
    read_results,
    write_results,
)
from polytask.training.study_table import StudyRows, StudyTable

if TYPE_CHECKING:
    import pandas as pd

RUNNABLE = ("losses", "gramian", "jacobian", "second evaluation", "several batches")
IMAGE_FRACTIONS = (0.5, 0.2, 0.3)
TABLE_TRAINING = {"epochs": 25, "patience": 5}
IMAGE_TRAINING = {"epochs": 8, "patience": None, "batch_size": 128, "learning_rate": 6e-3}
Progress = Callable[[StudyProgress], None] | None


def bench_table(
    frame: pd.DataFrame,
    targets: Sequence[str],
    *,
    out: Path,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    by: str | None = None,
    by_time: str | None = None,
    source: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Compare methods on a table with several targets.

    Args:
        frame: features and targets.
        targets: at least two target columns.
        out: the run folder, as a study leaves it but without a model.
        kinds: {target: kind} where it is not to be inferred.
        ignore: columns that are neither features nor targets.
        by: a column whose groups the split keeps together.
        by_time: a column to split by; the test rows are the latest.
        source: what to call the table.
        options: ``names``, ``seeds``, ``epochs``, ``trials``, ``workers``, ``resume``, ``overwrite``, ``progress``, see
            :func:`bench_pairs`.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: a table, target, method or folder that cannot be used, before any training.
    """
    batch = int(2 ** np.clip(np.round(np.log2(max(len(frame), 1) / 40)), 5, 9))
    about = {"kinds": dict(kinds or {}), "ignore": tuple(ignore), "by": by, "by_time": by_time}
    training = {**TABLE_TRAINING, "batch_size": batch}

    def rows(settings: Settings) -> tuple[StudyRows, Callable[[Path], StudyData]]:
        table = StudyTable.of(frame, settings)
        return table, lambda work: table.encode(work)[1]

    return _bench(rows, describe_data(frame, source), tuple(targets), about, training, out, **options)


def bench_pairs(
    folder: Path,
    *,
    out: Path,
    right: Path | None = None,
    rows: int = 10_000,
    names: Sequence[str] = (),
    seeds: int = 5,
    epochs: int | None = None,
    trials: int = 3,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = None,
) -> dict[str, Any]:
    """Compare methods on pairs of overlaid images (:mod:`polytask.data.multi_mnist`).

    Args:
        folder: of images as MNIST's.
        out: the run folder.
        right: another such folder, for the image at the lower right.
        rows: how many pairs are drawn: half of them to train on, a fifth to choose by, the rest to judge by.
        names: of balancing methods; every one that the training loop can run when empty, or when resuming, those of the run.
        seeds: of initial weights and the order of rows.
        epochs: at most, of every training.
        trials: of every row: weights of the tuned scalarization, learning rates of all others.
        workers: trainings at a time; results do not depend on it.
        resume: go on with an interrupted run in ``out``; a finished one is returned as it is.
        overwrite: replace a run in ``out``.
        progress: told of every finished training.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: images, a method or a folder that cannot be used, before any training.
    """
    pairs = ImagePairs.of(folder, right, rows, IMAGE_FRACTIONS, seed=0)
    source = folder.name if right is None else f"{folder.name} over {right.name}"
    return _bench(
        lambda _: (pairs, lambda __: pairs.encode()),
        pairs.describe(f"{len(pairs)} pairs of {source}"),
        ("left", "right"),
        {"fractions": IMAGE_FRACTIONS},
        IMAGE_TRAINING,
        out,
        names=names,
        seeds=seeds,
        epochs=epochs,
        trials=trials,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def _bench(
    rows_of: Callable[[Settings], tuple[StudyRows, Callable[[Path], StudyData]]],
    data: dict[str, Any],
    targets: tuple[str, ...],
    about: Mapping[str, Any],
    training: Mapping[str, Any],
    out: Path,
    *,
    names: Sequence[str] = (),
    seeds: int = 5,
    epochs: int | None = None,
    trials: int = 3,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = None,
) -> dict[str, Any]:
    began = time.perf_counter()
    if resume and not names and (out / CONFIG).is_file():
        names = read_config(out / CONFIG)["study"]["balance"]
    asked, skipped = contenders(names, len(targets))
    settings = Settings(
        targets=targets,
        balance=tuple(m.name for m in asked),
        seeds=tuple(range(seeds)),
        trials=trials,
        grouping=False,
        training={**training, **({"epochs": epochs} if epochs is not None else {})},
        **about,
    )
    rows, encode = rows_of(settings)
    if open_folder(out, config_of(settings.to_json(), data), resume=resume, overwrite=overwrite):
        return read_results(out)
    work = out / WORK
    workshop = Workshop(encode(work), settings.config, {}, work, workers or min(2, os.cpu_count() or 1), progress)
    search = MethodSearch(rows, settings, workshop, asked)
    search.run()
    workshop.announce("judging on the test rows")
    bench = search.bench("test")
    results = results_of(rows, settings, search, bench, workshop.data.spec, data["source"], time.perf_counter() - began)
    results["budget"]["text"] = budget(settings)
    results["skipped"] = [{"name": n, "reason": r} for n, r in {**skipped, **search.failed}.items()]
    results["comparison"] = asdict(compare(bench, {m.name: m.label for m in search.methods}))
    workshop.keep_logs(out / LOGS)
    write_results(out, results)
    shutil.rmtree(work)
    return read_results(out)


def contenders(names: Sequence[str], n_tasks: int) -> tuple[list[Method], dict[str, str]]:
    """The methods to compare, and those that are left out with the reason.

    Args:
        names: registered names or aliases; all of the family when empty.
        n_tasks: how many tasks there are.

    Raises:
        InputError: an unknown name, or one asked for by name that the training loop cannot run.
    """
    skipped = {}
    for name in names or [m.name for m in methods("balancing")]:
        reason = "" if name == LOG_LOSSES else _unfit(name)
        if reason and names:
            raise InputError(f"{name} cannot be compared here: it {reason}")
        if reason:
            skipped[name] = reason
    wanted = names or [m.name for m in methods("balancing") if m.name not in skipped]
    return balancing_methods(wanted, n_tasks), skipped


def _unfit(name: str) -> str:
    method = find(name, "balancing")
    if method.needs not in RUNNABLE:
        return f"needs {method.needs}, which the training loop does not give"
    needed = [option for option, default in method.options.items() if default is Parameter.empty]
    return f"does not run without {', '.join(needed)}" if needed else ""


def budget(settings: Settings) -> str:
    """The budget in words."""
    config = settings.config
    rates = ", ".join(f"{config.learning_rate * r:.2g}" for r in learning_rates(settings.trials))
    stop = f", stopped after {config.patience} without a better validation score" if config.patience else ""
    return (
        f"Every training has the same network, optimizer and at most {config.epochs} epoch{'s' * (config.epochs > 1)}{stop}; "
        "the epoch is chosen on validation rows. "
        f"Every row has {settings.trials} trial{'s' * (settings.trials > 1)} on the first seed, judged on validation rows "
        f"(weights for the tuned scalarization, at learning rate {config.learning_rate:.2g}; learning rates {rates} for all others), and "
        f"the best one {len(settings.seeds)} seeds. Balancing methods keep the other options of their papers."
    )

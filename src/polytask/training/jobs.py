"""The trainings of a study: each leaves its result in a folder of its own, so that none is done twice and any can be interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polytask.balancing import make
from polytask.errors import StorageError
from polytask.models.images import ImageModel, image_model
from polytask.models.tabular import TabularModel, tabular_model
from polytask.tasks import Tasks
from polytask.training.config import TrainConfig
from polytask.training.data import TaskData
from polytask.training.evaluation import predict_outputs
from polytask.training.loop import Interrupted, train
from polytask.training.protocol import Job
from polytask.training.state import CHECKPOINT

Array = npt.NDArray[Any]
Network = TabularModel | ImageModel
Decoded = dict[str, dict[str, Array]]  # {task: {"prediction": ..., "probability": ...}}

OUTCOME, OUTPUTS, WEIGHTS = "outcome.json", "outputs.safetensors", "model.safetensors"
LOGS = ("metrics.jsonl", "metrics.csv", "tensorboard")


@dataclass(frozen=True)
class StudyData:
    """The inputs of a study without its test labels, which no training may see.

    Attributes:
        inputs: {"train" | "validation" | "test": {"numeric", "categorical"}}, or {"image"} of pictures.
        targets: {"train" | "validation": {task: labels}}.
        spec: of the encoder, from which the networks are sized; of pictures their size, as ``image``.
        tasks: as :meth:`Tasks.to_json` writes them.
    """

    inputs: Mapping[str, Mapping[str, Array]]
    targets: Mapping[str, Mapping[str, Array]]
    spec: Mapping[str, Any]
    tasks: Sequence[dict[str, Any]]

    def part(self, name: str, tasks: Tasks) -> TaskData:
        """The rows of a part that have a label of at least one of the tasks."""
        targets = {n: torch.from_numpy(self.targets[name][n]) for n in tasks}
        labelled = torch.stack([t.kind.labelled(targets[n]) for n, t in tasks.items()]).any(0)
        return TaskData(self.tensors(name), targets).rows(labelled.nonzero().flatten())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The inputs of a part."""
        # workers get large arrays as read-only maps of one file, which torch will not share without a warning
        return {n: torch.from_numpy(np.array(a)) for n, a in self.inputs[name].items()}


@dataclass(frozen=True)
class Outcome:
    """What a finished training left.

    Attributes:
        job: what was trained.
        folder: where its weights lie.
        options: that rebuild its network.
        history: see :class:`~polytask.training.loop.TrainResult`.
        score: the best epoch's validation score.
        seconds: of training.
        steps: optimizer steps to the best epoch.
        validation: decoded outputs on the validation rows.
        test: decoded outputs on the test rows.
    """

    job: Job
    folder: Path
    options: dict[str, Any]
    history: dict[str, Any]
    score: float
    seconds: float
    steps: int
    validation: Decoded
    test: Decoded


@dataclass(frozen=True)
class StudyProgress:
    """Where a study stands.

    Attributes:
        stage: what is being done, in a few words.
        done: trainings finished.
        total: trainings planned so far; grows where groups of tasks turn out to be worth a look.
        seconds: since the study was started (or resumed).
        job: the training that has just finished, empty at the start of a stage.
    """

    stage: str
    done: int
    total: int
    seconds: float
    job: str = ""


def build_model(data: StudyData, tasks: Tasks, options: Mapping[str, Any], seed: int) -> Network:
    """The network of one training; the same for one task as for many, but for the number of heads."""
    build = image_model if "image" in data.spec else tabular_model
    return build(dict(data.spec), tasks, **{**options, "seed": seed})


def run_job(
    job: Job,
    data: StudyData,
    config: TrainConfig,
    model_options: Mapping[str, Any],
    work: Path,
    parent: int | None = None,
) -> str:
    """Train one model, or go on with it, and leave its outcome in ``work``; returns the job's name.

    Args:
        job: what to train.
        data: the encoded table.
        config: settings common to all trainings; the job's seed takes the place of theirs.
        model_options: of the network.
        work: the folder of all jobs.
        parent: a process without which this one has no business going on.
    """
    folder = work / job.name
    if (folder / OUTCOME).exists():
        return job.name
    tasks = Tasks.from_json(data.tasks)
    names = list(tasks)
    mine = tasks.only([names[k] for k in job.tasks])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # trainings run side by side, and their numbers must not depend on how many do
    try:
        model = build_model(data, mine, model_options, job.seed)
        options = {n: list(v) if isinstance(v, tuple) else v for n, v in job.options}
        config = config.but(seed=job.seed, learning_rate=config.learning_rate * job.rate)
        result = train(
            model,
            mine,
            data.part("train", mine),
            data.part("validation", mine),
            balancer=make(job.balancer, seed=job.seed, **options),
            config=config if job.level == "auto" else config.but(level=job.level),
            folder=folder,
            resume=True,
            progress=None if parent is None else _die_with(parent),
            trackers=("tensorboard",) if len(mine) > 1 and importlib.util.find_spec("tensorboard") else (),
        )
        outputs = {part: predict_outputs(model, mine, data.tensors(part)) for part in ("validation", "test")}
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        torch.set_num_threads(threads)
    per_epoch = -(-result.steps // max(len(result.history["epoch"]), 1))
    summary = {
        "options": model.options,
        "history": result.history,
        "score": result.best_score if result.best_score is not None else float("-inf"),
        "seconds": result.seconds,
        "steps": per_epoch * result.best_epoch,
    }
    _store(folder, model, outputs, summary, names)
    return job.name


def _die_with(parent: int) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        if os.getppid() != parent:  # the study was killed: its orphans must not write beside its successor
            os._exit(1)

    return check


def _store(
    folder: Path, model: Network, outputs: Mapping[str, Decoded], summary: dict[str, Any], names: list[str]
) -> None:
    from safetensors.numpy import save_file
    from safetensors.torch import save_file as save_weights

    arrays = {
        f"{part}/{names.index(task)}/{what}": np.ascontiguousarray(a)
        for part, decoded in outputs.items()
        for task, found in decoded.items()
        for what, a in found.items()
    }
    try:
        save_weights({n: t.contiguous() for n, t in model.state_dict().items()}, folder / WEIGHTS)
        save_file(arrays, folder / OUTPUTS)
        beside = folder / f".{OUTCOME}.part"
        beside.write_text(json.dumps(summary))
        os.replace(beside, folder / OUTCOME)  # last: its presence says that all is there
        (folder / CHECKPOINT).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"the result of a training cannot be written to {folder}: {error}") from error


def load_outcome(job: Job, work: Path, names: Sequence[str]) -> Outcome:
    """What a finished training left."""
    from safetensors.numpy import load_file

    folder = work / job.name
    summary = json.loads((folder / OUTCOME).read_text())
    found: dict[str, Decoded] = {"validation": {}, "test": {}}
    for key, array in load_file(folder / OUTPUTS).items():
        part, k, what = key.split("/")
        found[part].setdefault(names[int(k)], {})[what] = array
    return Outcome(
        job,
        folder,
        summary["options"],
        summary["history"],
        summary["score"],
        summary["seconds"],
        summary["steps"],
        found["validation"],
        found["test"],
    )


def load_weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    """The best weights of a finished training."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(outcome.folder / WEIGHTS)
    return found


class Workshop:
    """Does jobs, each once, several at a time.

    Args:
        data: the encoded table.
        config: settings of every training.
        model_options: of every network.
        work: the folder of all jobs.
        workers: processes at a time; the results do not depend on it.
        progress: told of every finished training.
    """

    def __init__(
        self,
        data: StudyData,
        config: TrainConfig,
        model_options: Mapping[str, Any],
        work: Path,
        workers: int,
        progress: Callable[[StudyProgress], None] | None,
    ) -> None:
        self.data, self.config, self.model_options = data, config, model_options
        self.work, self.workers, self.progress = work, workers, progress
        self.names = [t["name"] for t in data.tasks]
        self.outcomes: dict[str, Outcome] = {}
        self.planned = 0
        self.began = time.perf_counter()

    def __getitem__(self, job: Job) -> Outcome:
        return self.outcomes[job.name]

    def do(self, stage: str, jobs: Iterable[Job], observed: Job | None = None) -> None:
        """Finish all the jobs that are not yet done; interference is diagnosed along the ``observed`` one."""
        wanted = {j.name: j for j in jobs if j.name not in self.outcomes}
        self.planned += len(wanted)
        self.announce(stage)
        quiet = self.config.but(observe_every=0)
        calls = [
            (j, self.data, self.config if j == observed else quiet, dict(self.model_options), self.work)
            for j in sorted(wanted.values(), key=lambda j: (j != observed, -len(j.tasks)))  # the longest first
        ]
        for name in self._finished(calls):
            self.outcomes[name] = load_outcome(wanted[name], self.work, self.names)
            self.announce(stage, name)

    def _finished(self, calls: list[tuple[Any, ...]]) -> Iterator[str]:
        if self.workers == 1 or len(calls) < 2:
            yield from (run_job(*call) for call in calls)
            return
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=self.workers, return_as="generator_unordered")
        with warnings.catch_warnings():  # a worker that has grown is replaced by a fresh one, which is nobody's concern
            warnings.filterwarnings("ignore", message="A worker stopped")
            yield from parallel(delayed(run_job)(*call, os.getpid()) for call in calls)

    def announce(self, stage: str, job: str = "") -> None:
        """Tell the progress callback where the study stands."""
        if self.progress is not None:
            seconds = time.perf_counter() - self.began
            self.progress(StudyProgress(stage, len(self.outcomes), self.planned, seconds, job))

    def keep_logs(self, logs: Path) -> None:
        """Move the figures of every training to the run's ``logs`` folder."""
        for outcome in self.outcomes.values():
            for name in LOGS:
                if (outcome.folder / name).exists():
                    (logs / outcome.job.name).mkdir(parents=True, exist_ok=True)
                    shutil.move(outcome.folder / name, logs / outcome.job.name / name)

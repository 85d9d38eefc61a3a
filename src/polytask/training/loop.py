"""The training loop: thin, on accelerate, resumable at any step."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask.balancing import Balancer, make
from polytask.errors import InputError, TrainingError
from polytask.models import MultiTaskModel
from polytask.registry import find
from polytask.tasks import Tasks
from polytask.training.checkpoint import (
    clear_unfinished,
    generator_states,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
)
from polytask.training.config import TrainConfig
from polytask.training.data import Batches, TaskData, TrainingData, check_targets, to_device
from polytask.training.evaluation import (
    constant_loss,
    explained_share,
    losses_of,
    metrics_of,
    outputs_and_targets,
    score_of,
)
from polytask.training.progress import Progress, ProgressCallback
from polytask.training.step import Stepper, StepRecord, table_of
from polytask.training.trackers import Tracker, open_trackers

CHECKPOINT = "checkpoint.safetensors"
#: settings that may change between the parts of a resumed run
FREE_SETTINGS = ("epochs", "patience", "checkpoint_every", "device")

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainResult:
    """What came of a run; the model itself holds the best epoch's weights.

    Attributes:
        history: one entry an epoch in every list, None where unknown, JSON-ready: ``epoch``, ``train_loss`` {task}, ``validation``
            {task: {metric}}, ``validation_loss`` {task}, ``explained_share`` {task}, ``weights`` {task}, ``gradient_norm`` {task} (means over
            the epoch's steps), ``score``, ``seconds``, ``learning_rate``; and ``level``, where the gradients were taken, and
            ``interference`` where ``observe_every`` asked for it.
        best_epoch: the epoch whose weights the model holds, counted from 1.
        best_score: its score (higher is better), None without validation data.
        seconds: of training, all parts of a resumed run together.
        stopped: ``epochs``, ``patience`` or ``interrupted``.
        steps: optimizer steps taken in all.
    """

    history: dict[str, Any]
    best_epoch: int
    best_score: float | None
    seconds: float
    stopped: str
    steps: int = 0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the step was finished and, where there is a folder, a checkpoint written from which ``resume=True`` goes on.

    Attributes:
        result: what there is so far; the model holds the best epoch's weights.
        checkpoint: the file, or None without a folder.
    """

    def __init__(self, result: TrainResult, checkpoint: Path | None) -> None:
        super().__init__("training was interrupted")
        self.result = result
        self.checkpoint = checkpoint


def train(
    model: MultiTaskModel,
    tasks: Tasks,
    train_data: TrainingData,
    validation_data: TrainingData | None = None,
    *,
    balancer: Balancer | str = "equal",
    config: TrainConfig | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    trackers: Sequence[str | Tracker] = (),
    optimizer: OptimizerLike | None = None,
) -> TrainResult:
    """Train a model on several tasks.

    The same call with the same data on the same machine and number of threads gives the same weights bit by bit, whether it ran through or was
    killed and resumed any number of times. The caller's own random generators are left as they were.

    Args:
        model: maps inputs to ``{task: raw output}``; holds the best epoch's weights afterwards.
        tasks: what is learnt; the model may serve more.
        train_data: rows in memory, or an iterable of ``(inputs, {task: labels})``, such as a DataLoader. To resume within an epoch, an
            iterable must repeat itself when the random generators do.
        validation_data: the same; without it nothing stops early and the last weights are kept.
        balancer: a balancing method or its name.
        config: the settings.
        folder: where the checkpoint, ``metrics.jsonl`` and ``metrics.csv`` go; nothing is written without it.
        resume: go on from the folder's checkpoint, or begin where there is none yet.
        progress: called with a :class:`Progress` some times a second at most, and at the end of every epoch.
        trackers: ``"tensorboard"`` or own objects with ``start``, ``log`` and ``close``.
        optimizer: an optimizer of the model's parameters, or a function that makes one of them; AdamW when omitted.

    Raises:
        InputError: data, tasks, model or checkpoint that do not fit, before the first step.
        TrainingError: a loss or gradient that is not finite, with task, epoch and step; the model holds the best weights before it.
        StorageError: the checkpoint cannot be written (the former one is intact) or read.
        Interrupted: Ctrl-C.
    """
    config = config or TrainConfig()
    _check(model, tasks, train_data, validation_data, config)
    with _own_generators(config.seed):
        run = _Run(model, tasks, train_data, validation_data, balancer, config, folder, progress, optimizer)
        run.trackers = open_trackers(trackers, run.folder) if run.accelerator.is_main_process else []
        try:
            return run.all_epochs(resume)
        finally:
            run.close()


def _check(
    model: Any, tasks: Tasks, train_data: TrainingData, validation_data: TrainingData | None, config: TrainConfig
) -> None:
    if not isinstance(model, MultiTaskModel):
        raise InputError(
            f"the model is a MultiTaskModel, not {type(model).__name__}: polytask.wrap makes one of any module"
        )
    missing = [n for n in tasks if n not in model.tasks]
    if missing:
        raise InputError(f"the model has no head for the task {missing[0]!r}")
    if config.stop_on not in (None, "delta_m", *tasks):
        raise InputError(
            f"stop_on names {config.stop_on!r}, which is neither 'delta_m' nor one of the tasks {', '.join(tasks)}"
        )
    if isinstance(train_data, TaskData):
        check_targets(train_data, tasks, "training")
    if isinstance(validation_data, TaskData) and config.stop_on in tasks:
        check_targets(validation_data, tasks.only([str(config.stop_on)]), "validation")
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise InputError("precision 'fp16' needs a GPU: take 'bf16' on this device")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, and there is none")


@contextlib.contextmanager
def _own_generators(seed: int) -> Iterator[None]:
    """Random numbers and algorithms that depend on the seed alone; the caller's generators stay as they were."""
    from accelerate.utils import set_seed

    before, strict = generator_states(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result
    set_seed(seed)
    try:
        yield
    finally:
        restore_generators(before)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class _Interruption:
    """Turns the first Ctrl-C into a flag that is read between steps; the second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class _Run:
    """The state of one run: everything in :meth:`tree` and nothing else survives a restart."""

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Tasks,
        train_data: TrainingData,
        validation_data: TrainingData | None,
        balancer: Balancer | str,
        config: TrainConfig,
        folder: Path | str | None,
        progress: ProgressCallback | None,
        optimizer: OptimizerLike | None,
    ) -> None:
        self.tasks, self.config, self.progress = tasks, config, progress
        self.folder = Path(folder) if folder is not None else None
        self.trackers: list[Tracker] = []
        self.accelerator = _accelerator(config)
        self.validation_data = validation_data
        self.train_data = to_place(train_data, self.accelerator)
        self.batches = Batches(
            self.train_data,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            seed=config.seed,
            share=(self.accelerator.process_index, self.accelerator.num_processes),
        )
        if self.batches.steps is None and (config.schedule != "constant" or config.warmup):
            raise InputError("data that does not know its length allows neither a cosine schedule nor a warm-up")
        self.balancer = _balancer(balancer, tasks, config.seed)
        made = optimizer if isinstance(optimizer, torch.optim.Optimizer) else _optimizer(model, config, optimizer)
        self.base_rates = [float(group["lr"]) for group in made.param_groups]
        self.model = model
        prepared, self.optimizer = self.accelerator.prepare(model, made)
        self.step = Stepper(prepared, tasks, self.balancer, self.optimizer, self.accelerator, config)
        self.epoch = self.step_in_epoch = self.steps_done = 0
        self.history = _empty_history(tasks)
        self.records: list[StepRecord] = []
        self.earlier_records = table_of([], tuple(tasks))
        self.best: dict[str, Any] = {"epoch": 0, "score": None, "weights": None}
        self.reference: dict[str, float | None] = {}
        self.stopped = ""
        self.seconds_before = self.epoch_seconds_before = 0.0
        self.began = self.epoch_began = time.perf_counter()
        self.last_shown = 0.0
        self.steps_here = 0
        self.epoch_generators = generator_states()

    # ---- the loop ----

    def all_epochs(self, resume: bool) -> TrainResult:
        """Train until an epoch is the last one; the model then holds the best weights."""
        if resume:
            self.restore()
        elif self.folder is not None and self.accelerator.is_main_process:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        for tracker in self.trackers:
            tracker.start([self.row(i) for i in range(self.epoch)])
        with _Interruption() as interruption:
            while not self.over():
                try:
                    self.one_epoch(interruption)
                except TrainingError as error:
                    self.keep_best()
                    raise TrainingError(f"epoch {self.epoch + 1}, step {self.step_in_epoch + 1}: {error}") from error
                if interruption.asked and not self.over():
                    self.save()
                    self.keep_best()
                    raise Interrupted(
                        self.result("interrupted"), self.folder / CHECKPOINT if self.folder is not None else None
                    )
                self.save()
        self.keep_best()
        self.show(ended=self.stopped)
        return self.result(self.stopped)

    def over(self) -> bool:
        """Whether the run is at its end, and why (:attr:`stopped`)."""
        patience, best = self.config.patience, int(self.best["epoch"])
        waited = self.epoch - best
        self.stopped = ""
        if self.selects and patience is not None and self.epoch > 0 and waited >= patience:
            self.stopped = "patience"
        elif self.epoch >= self.config.epochs:
            self.stopped = "epochs"
        return bool(self.stopped)

    @property
    def selects(self) -> bool:
        """Whether the best epoch is chosen, rather than the last one kept."""
        return self.config.stop_on is not None and self.validation_data is not None

    def one_epoch(self, interruption: _Interruption) -> None:
        """Train from the current step to the end of the epoch, or to the step in which Ctrl-C came."""
        if self.step_in_epoch == 0:
            self.balancer.begin_epoch()
            self.epoch_generators = generator_states()
            now = None
        else:  # a restarted epoch: an iterable finds its order again from the generators as they were at the epoch's start
            now = generator_states()
            restore_generators(self.epoch_generators)
        self.epoch_began = time.perf_counter()
        self.model.train()
        for pieces in self.batches.epoch(self.epoch, start=self.step_in_epoch):
            if now is not None:
                restore_generators(now)
                now = None
            self.set_rates()
            record = self.step(pieces, self.steps_done)
            if record is not None:
                self.records.append(record)
            self.step_in_epoch += 1
            self.steps_done += 1
            self.steps_here += 1
            self.show()
            if interruption.asked:
                return
            if self.config.checkpoint_every and self.step_in_epoch % self.config.checkpoint_every == 0:
                self.save()
        if now is not None:  # the checkpoint was taken after the epoch's last step
            restore_generators(now)
        self.end_epoch()

    def end_epoch(self) -> None:
        """Evaluate, remember the best weights, write the epoch's figures."""
        table = self.table()
        losses, metrics, shares, score = self.validate()
        if self.observes():
            self.diagnose()
        means = _means(table)
        h = self.history
        h["epoch"].append(self.epoch + 1)
        h["score"].append(score)
        h["seconds"].append(self.epoch_seconds_before + time.perf_counter() - self.epoch_began)
        h["learning_rate"].append(float(self.optimizer.param_groups[0]["lr"]))
        observation = self.balancer.observation
        h["level"] = observation.level if observation is not None else None
        for k, name in enumerate(self.tasks):
            for row, key in enumerate(("train_loss", "weights", "gradient_norm")):
                h[key][name].append(means[row][k])
            h["validation_loss"][name].append(losses.get(name))
            h["explained_share"][name].append(shares.get(name))
            for metric, value in h["validation"][name].items():
                value.append(metrics.get(name, {}).get(metric))
        self.epoch += 1
        self.step_in_epoch, self.records, self.epoch_seconds_before = 0, [], 0.0
        self.earlier_records = table_of([], tuple(self.tasks))
        if self.selects and score is not None and (self.best["score"] is None or score > self.best["score"]):
            self.best = {"epoch": self.epoch, "score": score, "weights": _copy(self.model.state_dict())}
        for tracker in self.trackers:
            tracker.log(self.row(self.epoch - 1))
        self.show(always=True)

    def validate(
        self,
    ) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]], dict[str, float], float | None]:
        """Validation loss, metrics and explained share of every task, and the score."""
        if self.validation_data is None:
            return {}, {}, {}, None
        outputs, targets = outputs_and_targets(self.model, self.tasks, self.validation_data)
        if not self.reference:
            self.reference = {
                n: constant_loss(t, outputs[n], targets[n]) for n, t in self.tasks.items() if n in targets
            }
        losses, metrics = losses_of(self.tasks, outputs, targets), metrics_of(self.tasks, outputs, targets)
        shares = explained_share(losses, self.reference)
        score = score_of(self.config.stop_on, self.tasks, shares, metrics)
        if self.accelerator.num_processes > 1:  # one process decides for all
            from accelerate.utils import broadcast_object_list

            (score,) = broadcast_object_list([score])
        return losses, metrics, shares, score

    def observes(self) -> bool:
        """Whether interference is diagnosed after this epoch."""
        every = self.config.observe_every
        return bool(every) and (self.epoch + 1) % every == 0 and len(self.tasks) > 1

    def diagnose(self) -> None:
        """Add a diagnosis of interference on training batches to the history."""
        from polytask.training.diagnosis import diagnose

        seen = diagnose(
            self.model,
            self.train_data,
            self.tasks,
            batch_size=self.config.batch_size,
            seed=self.config.seed + self.epoch,
        )
        log = self.history.setdefault("interference", {"tasks": list(seen.tasks), "epochs": [], "sentences": []})
        log["epochs"].append(self.epoch + 1)
        for key, value in seen.to_json().items():
            if key not in ("tasks", "sentences"):
                log.setdefault(key, []).append(value)
        log["sentences"] = list(seen.sentences)

    def set_rates(self) -> None:
        """The learning rate is a function of the step alone: nothing of it needs to be saved."""
        per_epoch = self.batches.steps
        factor = self.config.rate_factor(self.steps_done, None if per_epoch is None else per_epoch * self.config.epochs)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    # ---- what it leaves ----

    def table(self) -> Any:
        """The records of all steps of this epoch, those before a restart included."""
        return np.concatenate([self.earlier_records, table_of(self.records, tuple(self.tasks))])

    def row(self, i: int) -> dict[str, float | None]:
        """The figures of epoch i (from 0) as trackers read them."""
        h = self.history
        row: dict[str, float | None] = {key: h[key][i] for key in ("epoch", "score", "seconds", "learning_rate")}
        names = {
            "train_loss": "train_loss",
            "validation_loss": "validation_loss",
            "weights": "weight",
            "gradient_norm": "gradient_norm",
        }
        for task in self.tasks:
            row |= {f"{task}/{label}": h[key][task][i] for key, label in names.items()}
            row |= {f"{task}/{metric}": values[i] for metric, values in h["validation"][task].items()}
        return row

    def keep_best(self) -> None:
        """Give the model the best epoch's weights, or leave it the last ones where nothing was chosen."""
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"])

    def result(self, stopped: str) -> TrainResult:
        """What there is so far."""
        best = int(self.best["epoch"]) if self.best["weights"] is not None else self.epoch
        score = self.history["score"][best - 1] if best else None
        return TrainResult(self.history, best, score, self.seconds(), stopped, self.steps_done)

    def seconds(self) -> float:
        """Seconds of training, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self.began

    def show(self, always: bool = False, ended: str = "") -> None:
        """Tell the progress callback where the run stands, at most ten times a second."""
        now = time.perf_counter()
        if self.progress is None or not (always or ended or now - self.last_shown > 0.1):
            return
        self.last_shown = now
        per_epoch, h = self.batches.steps, self.history
        steps = None if per_epoch is None else per_epoch * self.config.epochs
        pace = (now - self.began) / self.steps_here if self.steps_here else None
        left = None if steps is None or pace is None else 0.0 if ended else pace * (steps - self.steps_done)
        losses = {n: values[-1] if values else None for n, values in h["train_loss"].items()}
        score = h["score"][-1] if h["score"] else None
        best = int(self.best["epoch"])
        self.progress(
            Progress(
                self.epoch, self.config.epochs, self.steps_done, steps, self.seconds(), left, losses, score, best, ended
            )
        )

    def close(self) -> None:
        """Close the trackers and give the model back as it was handed in."""
        for tracker in self.trackers:
            tracker.close()
        self.accelerator.unwrap_model(self.step.model, keep_fp32_wrapper=False)
        self.model.eval()

    # ---- what survives ----

    def tree(self) -> dict[str, Any]:
        """Everything a restart needs."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "config": self.config.to_json(),
            "tasks": list(self.tasks),
            "method": self.balancer.method.name,
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "step": self.step_in_epoch,
            "steps": self.steps_done,
            "seconds": self.seconds(),
            "epoch_seconds": self.epoch_seconds_before
            + (time.perf_counter() - self.epoch_began if self.step_in_epoch else 0.0),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "generators": gather_object([{"now": generator_states(), "epoch": self.epoch_generators}]),
            "records": self.table(),
            "history": self.history,
            "best": self.best,
            "reference": self.reference,
        }

    def save(self) -> None:
        """Write the checkpoint, where there is a folder."""
        if self.folder is None:
            return
        tree = self.tree()
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder / CHECKPOINT, tree)
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if self.folder is None:
            raise InputError("resume=True needs the folder of the run")
        path = self.folder / CHECKPOINT
        if self.accelerator.is_main_process:
            clear_unfinished(path)
        if not path.exists():
            return
        tree = load_checkpoint(path)
        self._check_checkpoint(tree, path)
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.balancer.load_state_dict(tree["balancer"])
        if self.accelerator.scaler is not None and tree["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(tree["scaler"])
        self.epoch, self.step_in_epoch, self.steps_done = tree["epoch"], tree["step"], tree["steps"]
        self.seconds_before, self.epoch_seconds_before = tree["seconds"], tree["epoch_seconds"]
        self.history, self.best, self.reference = tree["history"], tree["best"], tree["reference"]
        self.earlier_records = tree["records"]
        mine = tree["generators"][self.accelerator.process_index]
        self.epoch_generators = mine["epoch"]
        restore_generators(mine["now"])

    def _check_checkpoint(self, tree: dict[str, Any], path: Path) -> None:
        now = {"tasks": list(self.tasks), "balancing method": self.balancer.method.name, **self.config.to_json()}
        then = {"tasks": tree["tasks"], "balancing method": tree["method"], **tree["config"]}
        for name, value in now.items():
            if name not in FREE_SETTINGS and then.get(name) != value:
                raise InputError(f"the checkpoint {path} was made with {name} {then.get(name)!r}, not {value!r}")
        if len(tree["generators"]) != self.accelerator.num_processes:
            raise InputError(
                f"the checkpoint {path} was made by {len(tree['generators'])} processes, not {self.accelerator.num_processes}"
            )
        if tree["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run was begun with {tree['threads']} threads and goes on with {torch.get_num_threads()}: the weights will agree with those "
                "of an unbroken run to rounding only",
                stacklevel=2,
            )


def to_place(data: TrainingData, accelerator: Any) -> TrainingData:
    """Rows in memory on the device; of a loader, under several processes, this process's share."""
    if isinstance(data, TaskData):
        return data.to(accelerator.device)
    if accelerator.num_processes > 1 and isinstance(data, torch.utils.data.DataLoader):
        return accelerator.prepare_data_loader(data)  # type: ignore[no-any-return]
    return data


def _accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    if AcceleratorState().initialized if AcceleratorState._shared_state else False:
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    # a task may be absent from a process's batch, and its head then gets no gradient there
    return Accelerator(
        mixed_precision=config.precision,
        cpu=config.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _balancer(balancer: Balancer | str, tasks: Tasks, seed: int) -> Balancer:
    if isinstance(balancer, str):
        balancer = make(balancer, **({"seed": seed} if "seed" in find(balancer, "balancing").options else {}))
    balancer.bind(list(tasks))
    return balancer


def _optimizer(model: torch.nn.Module, config: TrainConfig, make_one: Any) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if make_one is not None:
        made: torch.optim.Optimizer = make_one(parameters)
        return made
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _empty_history(tasks: Tasks) -> dict[str, Any]:
    history: dict[str, Any] = {key: [] for key in ("epoch", "score", "seconds", "learning_rate")}
    for key in ("train_loss", "validation_loss", "explained_share", "weights", "gradient_norm"):
        history[key] = {name: [] for name in tasks}
    history["validation"] = {n: {metric.name: [] for metric in t.metrics} for n, t in tasks.items()}
    history["level"] = None
    return history


def _means(table: Any) -> list[list[float | None]]:
    """Means over the steps of each figure of each task, None where no step knows it."""
    known = ~np.isnan(table)
    count = known.sum(0)
    total = np.where(known, table, 0.0).sum(0)
    return [
        [float(t / c) if c else None for t, c in zip(ts, cs, strict=True)] for ts, cs in zip(total, count, strict=True)
    ]


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return copy.deepcopy({n: t.detach().cpu() for n, t in weights.items()})

"""The training loop: thin, on accelerate, resumable at any step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.balancing import Balancer, make
from polytask.balancing.presets import resolve
from polytask.errors import InputError, TrainingError
from polytask.models import MultiTaskModel
from polytask.tasks import Tasks
from polytask.training.config import TrainConfig
from polytask.training.data import Batches, TaskData, TrainingData, check_targets
from polytask.training.environment import Interruption, accelerator_for, own_generators, placed
from polytask.training.evaluation import (
    explained_share,
    losses_of,
    metrics_of,
    outputs_and_targets,
    reference_losses,
    score_of,
)
from polytask.training.history import add_diagnosis, add_epoch, means, row_of
from polytask.training.optimizers import OptimizerLike, optimizer_for
from polytask.training.progress import Display, ProgressCallback
from polytask.training.state import CHECKPOINT, RunState
from polytask.training.step import Stepper
from polytask.training.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainResult:
    """What came of a run; the model itself holds the best epoch's weights.

    Attributes:
        history: one entry an epoch in every list, None where unknown, JSON-ready: ``epoch``, ``score``, ``seconds``, ``learning_rate``;
            {task: ...} ``train_loss``, ``validation_loss``, ``explained_share``, ``weights``, ``gradient_norm`` (weights, norms and
            training losses are means over the epoch's steps); ``validation`` {task: {metric: ...}}; and ``level``, where gradients were
            taken, and ``interference`` where ``observe_every`` asked for it.
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
    steps: int


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

    The same call with the same data on the same machine and number of threads gives the same weights bit by bit, whether it ran
    through or was killed and resumed any number of times. The caller's own random generators are left as they were.

    Args:
        model: maps inputs to ``{task: raw output}``; holds the best epoch's weights afterwards, in evaluation mode.
        tasks: what is learnt; the model may serve more.
        train_data: rows in memory, or an iterable of ``(inputs, {task: labels})``, such as a DataLoader. To resume within an epoch,
            an iterable must repeat itself when the global random generators do.
        validation_data: the same; without it nothing stops early and the last weights are kept.
        balancer: a balancing method or its name.
        config: the settings.
        folder: where the checkpoint, ``metrics.jsonl`` and ``metrics.csv`` go; nothing is written without it.
        resume: go on from the folder's checkpoint, or begin where there is none yet.
        progress: called with a :class:`~polytask.training.progress.Progress` ten times a second at most, and at the end of every epoch.
        trackers: ``"tensorboard"`` or own objects with ``start``, ``log`` and ``close``.
        optimizer: an optimizer of the model's parameters, a function that makes one of them, or the name of one that is told the
            losses of single tasks (``"mtadam"``, ``"adatask"``, ``"madam"``, ``"dualoptim_plus"``); AdamW when omitted. A parameter
            group may have a ``decay``: its rate is multiplied by it at every step.

    Raises:
        InputError: data, tasks, model or checkpoint that do not fit, before the first step.
        TrainingError: a loss or gradient that is not finite, with task, epoch and step; the model holds the best weights before it.
        StorageError: the checkpoint cannot be written (the former one is intact) or read.
        Interrupted: Ctrl-C.
    """
    config = config or TrainConfig()
    _check(model, tasks, train_data, validation_data, config)
    accelerator = accelerator_for(config)
    with own_generators(config.seed + accelerator.process_index):
        loop = _Loop(model, tasks, train_data, validation_data, balancer, config, folder, optimizer, accelerator)
        if accelerator.is_main_process:
            loop.trackers = open_trackers(trackers, loop.state.folder)
            loop.display = Display(progress, config.epochs, loop.batches.steps)
        try:
            return loop.run(resume)
        finally:
            loop.close()


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


class _Loop:
    """Steps make epochs, epochs make a run; what must survive a restart is in ``state``."""

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Tasks,
        train_data: TrainingData,
        validation_data: TrainingData | None,
        balancer: Balancer | str,
        config: TrainConfig,
        folder: Path | str | None,
        optimizer: OptimizerLike | None,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.tasks, self.config, self.validation_data = model, tasks, config, validation_data
        self.accelerator = accelerator
        self.train_data = placed(train_data, self.accelerator)
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
        made = optimizer_for(model, tuple(tasks), config, optimizer, accelerator.num_processes)
        self.base_rates = [float(group["lr"]) for group in made.param_groups]
        self.prepared, self.optimizer = self.accelerator.prepare(model, made)
        self.step = Stepper(self.prepared, tasks, self.balancer, self.optimizer, self.accelerator, config)
        self.state = RunState(
            model,
            tasks,
            self.optimizer,
            self.balancer,
            self.accelerator,
            config,
            Path(folder) if folder is not None else None,
        )
        self.trackers: list[Tracker] = []
        self.display = Display(None, config.epochs, self.batches.steps)

    def run(self, resume: bool) -> TrainResult:
        """Train until an epoch is the last one; the model then holds the best weights."""
        state = self.state
        state.restore() if resume else state.clear()
        for tracker in self.trackers:
            tracker.start([row_of(state.history, i) for i in range(state.epoch)])
        with Interruption() as interruption:
            while not self.ended():
                try:
                    self.one_epoch(interruption)
                except TrainingError as error:
                    state.keep_best()
                    raise TrainingError(f"epoch {state.epoch + 1}, step {state.step_in_epoch + 1}: {error}") from error
                state.save()
                if interruption.asked and not self.ended():
                    state.keep_best()
                    raise Interrupted(self.result("interrupted"), state.folder and state.folder / CHECKPOINT)
        state.keep_best()
        self.display.show(state, ended=self.ended())
        return self.result(self.ended())

    def ended(self) -> str:
        """Why the run is at its end, empty while it is not."""
        state, patience = self.state, self.config.patience
        if state.epoch >= self.config.epochs:
            return "epochs"
        if self.selects and patience is not None and state.epoch - state.best["epoch"] >= patience:
            return "patience"
        return ""

    @property
    def selects(self) -> bool:
        """Whether the best epoch is chosen, rather than the last one kept."""
        return self.config.stop_on is not None and self.validation_data is not None

    def one_epoch(self, interruption: Interruption) -> None:
        """Train from the current step to the end of the epoch, or to the step in which Ctrl-C came."""
        state, every = self.state, self.config.checkpoint_every
        if state.step_in_epoch == 0:
            self.balancer.begin_epoch()
        self.model.train()
        skipped = state.enter_epoch()
        for pieces in self.batches.epoch(state.epoch, state.step_in_epoch, skipped):
            self.set_rates()
            state.count(self.step(pieces, state.step_in_epoch))
            self.display.show(state)
            if interruption.asked:
                return
            if every and state.step_in_epoch % every == 0:
                state.save()
        self.end_epoch()

    def end_epoch(self) -> None:
        """Evaluate, remember the best weights, hand out the epoch's figures."""
        state, tasks = self.state, self.tasks
        of_tasks = means(state.table(), tasks)
        metrics, score = self.validate(of_tasks)
        if self.config.observe_every and (state.epoch + 1) % self.config.observe_every == 0 and len(tasks) > 1:
            self.diagnose()
        observation = self.balancer.observation
        state.history["level"] = observation.level if observation is not None else None
        rate = float(self.optimizer.param_groups[0]["lr"])
        figures = {"epoch": state.epoch + 1, "score": score, "seconds": state.epoch_seconds(), "learning_rate": rate}
        add_epoch(state.history, figures, of_tasks, metrics)
        if score is not None:
            self.balancer.after_validation(-score)
        state.finish_epoch(score if self.selects else None)
        for tracker in self.trackers:
            tracker.log(row_of(state.history, state.epoch - 1))
        self.display.show(state, always=True)

    def validate(self, of_tasks: dict[str, Any]) -> tuple[dict[str, dict[str, float | None]], float | None]:
        """Validation metrics and the score; validation losses and explained shares are added to ``of_tasks``."""
        if self.validation_data is None:
            return {}, None
        state, tasks = self.state, self.tasks
        outputs, targets = outputs_and_targets(self.model, tasks, self.validation_data)
        if not state.reference:
            state.reference = reference_losses(tasks, outputs, targets)
        losses, metrics = losses_of(tasks, outputs, targets), metrics_of(tasks, outputs, targets)
        shares = explained_share(losses, state.reference)
        of_tasks |= {"validation_loss": losses, "explained_share": shares}
        score = score_of(self.config.stop_on, tasks, shares, metrics)
        if self.accelerator.num_processes > 1:  # one process decides for all
            from accelerate.utils import broadcast_object_list

            (score,) = broadcast_object_list([score])
        return metrics, score

    def diagnose(self) -> None:
        """Add a diagnosis of interference on training batches to the history."""
        from polytask.training.diagnosis import diagnose

        state, config = self.state, self.config
        seen = diagnose(
            self.model, self.train_data, self.tasks, batch_size=config.batch_size, seed=config.seed + state.epoch
        )
        add_diagnosis(state.history, state.epoch + 1, seen)

    def set_rates(self) -> None:
        """The learning rate is a function of the step alone: nothing of it needs to be saved."""
        per_epoch = self.batches.steps
        factor = self.config.rate_factor(
            self.state.steps, None if per_epoch is None else per_epoch * self.config.epochs
        )
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor * group.get("decay", 1.0) ** self.state.steps

    def result(self, stopped: str) -> TrainResult:
        """What there is so far."""
        state = self.state
        best = state.best["epoch"] or state.epoch
        score = state.history["score"][best - 1] if best else None
        return TrainResult(state.history, best, score, state.seconds(), stopped, state.steps)

    def close(self) -> None:
        """Close the trackers and give the model back as it was handed in."""
        for tracker in self.trackers:
            tracker.close()
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
        self.model.eval()


def _balancer(balancer: Balancer | str, tasks: Tasks, seed: int) -> Balancer:
    if isinstance(balancer, str):
        options = resolve(balancer)[0].options
        balancer = make(balancer, **({"seed": seed} if "seed" in options else {}))
    balancer.bind(list(tasks))
    return balancer

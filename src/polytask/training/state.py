"""What a run must remember to end, after a restart at any moment, with the very weights it would have had."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.balancing import Balancer
from polytask.errors import InputError, StorageError
from polytask.models import MultiTaskModel
from polytask.tasks import Tasks
from polytask.training.checkpoint import (
    clear_unfinished,
    generator_states,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
)
from polytask.training.config import TrainConfig
from polytask.training.history import empty_history
from polytask.training.step import StepRecord, table_of

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.safetensors"
#: settings that may change between the parts of a resumed run
FREE_SETTINGS = ("epochs", "patience", "checkpoint_every", "device")


class RunState:
    """Where a run stands; :meth:`tree` is written to the checkpoint, :meth:`restore` reads it.

    Attributes:
        epoch: epochs finished.
        step_in_epoch: steps finished in the current epoch: the position of the sampler, whose order follows from seed and epoch.
        steps: steps finished in all, on which the learning rate depends.
        history: the figures of all epochs.
        best: ``epoch`` (0 before the first), ``score`` and ``weights`` of the best epoch so far.
        reference: {task: loss of the best constant prediction on the validation rows}.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Tasks,
        optimizer: Any,
        balancer: Balancer,
        accelerator: Accelerator,
        config: TrainConfig,
        folder: Path | None,
    ) -> None:
        self.model, self.tasks, self.optimizer, self.balancer = model, tasks, optimizer, balancer
        self.accelerator, self.config, self.folder = accelerator, config, folder
        self.epoch = self.step_in_epoch = self.steps = 0
        self.history = empty_history(tasks)
        self.best: dict[str, Any] = {"epoch": 0, "score": None, "weights": None}
        self.reference: dict[str, float | None] = {}
        self._records: list[StepRecord] = []
        self._earlier_records = table_of([], tuple(tasks))
        self._epoch_generators: dict[str, Any] | None = None
        self._began = self._epoch_began = time.perf_counter()
        self._seconds_before = self._epoch_seconds_before = 0.0

    # ---- within an epoch ----

    def enter_epoch(self) -> Callable[[], None]:
        """Start the epoch's clock and put the generators where they stood when the epoch began.

        An iterable of batches (a DataLoader) draws its order from the global generators then, and so finds it again in a restarted run.

        Returns:
            What is to be called once the steps already taken are skipped: the generators go on from where the checkpoint was taken.
        """
        self._epoch_began = time.perf_counter()
        now = generator_states()
        if self.step_in_epoch == 0:
            self._epoch_generators = now
        else:
            assert self._epoch_generators is not None
            restore_generators(self._epoch_generators)
        return lambda: restore_generators(now)

    def count(self, record: StepRecord | None) -> None:
        """One more step was taken."""
        if record is not None:
            self._records.append(record)
        self.step_in_epoch += 1
        self.steps += 1

    def table(self) -> npt.NDArray[np.float64]:
        """Losses, weights and gradient norms of all steps of this epoch, shape (steps, 3, tasks), those before a restart included."""
        return np.concatenate([self._earlier_records, table_of(self._records, tuple(self.tasks))])

    def epoch_seconds(self) -> float:
        """Seconds spent on the current epoch."""
        return self._epoch_seconds_before + time.perf_counter() - self._epoch_began

    def seconds(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self._seconds_before + time.perf_counter() - self._began

    def finish_epoch(self, score: float | None) -> None:
        """The epoch is over; with a score above the best one its weights are kept."""
        self.epoch += 1
        self.step_in_epoch, self._records, self._epoch_seconds_before = 0, [], 0.0
        self._earlier_records = table_of([], tuple(self.tasks))
        if score is not None and (self.best["score"] is None or score > self.best["score"]):
            weights = copy.deepcopy({n: t.detach().cpu() for n, t in self.model.state_dict().items()})
            self.best = {"epoch": self.epoch, "score": score, "weights": weights}

    def keep_best(self) -> None:
        """Give the model the best epoch's weights, or leave it the last ones where nothing was chosen."""
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"])

    # ---- across restarts ----

    @property
    def _moved_by(self) -> str:
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__  # beneath accelerate's wrapper

    def tree(self) -> dict[str, Any]:
        """Everything a restart needs."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "config": self.config.to_json(),
            "tasks": list(self.tasks),
            "method": self.balancer.method.name,
            "moved_by": self._moved_by,
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "steps": self.steps,
            "seconds": self.seconds(),
            "epoch_seconds": self.epoch_seconds() if self.step_in_epoch else 0.0,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "generators": gather_object([{"now": generator_states(), "epoch": self._epoch_generators}]),
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

    def clear(self) -> None:
        """Forget an earlier run in the same folder.

        Raises:
            StorageError: its checkpoint cannot be removed.
        """
        if self.folder is None or not self.accelerator.is_main_process:
            return
        try:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"the old checkpoint in {self.folder} cannot be removed ({error})") from error

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one.

        Raises:
            InputError: no folder, or a checkpoint of another run.
            StorageError: a damaged checkpoint.
        """
        if self.folder is None:
            raise InputError("resume=True needs the folder of the run")
        path = self.folder / CHECKPOINT
        if self.accelerator.is_main_process:
            clear_unfinished(path)
        if not path.exists():
            return
        tree = load_checkpoint(path)
        self._check(tree, path)
        self._load_model(tree["model"], path)
        self.optimizer.load_state_dict(tree["optimizer"])
        self.balancer.load_state_dict(tree["balancer"])
        if self.accelerator.scaler is not None and tree["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(tree["scaler"])
        self.epoch, self.step_in_epoch, self.steps = tree["epoch"], tree["step_in_epoch"], tree["steps"]
        self._seconds_before, self._epoch_seconds_before = tree["seconds"], tree["epoch_seconds"]
        self.history, self.best, self.reference = tree["history"], tree["best"], tree["reference"]
        self._earlier_records = tree["records"]
        mine = tree["generators"][self.accelerator.process_index]
        self._epoch_generators = mine["epoch"]
        restore_generators(mine["now"])

    def _load_model(self, weights: dict[str, Tensor], path: Path) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise InputError(f"the checkpoint {path} holds the weights of another model: {detail}") from error

    def _check(self, tree: dict[str, Any], path: Path) -> None:
        method, moved_by = self.balancer.method.name, self._moved_by
        now = {"tasks": list(self.tasks), "the balancing method": method, "the optimizer": moved_by}
        then = {"tasks": tree["tasks"], "the balancing method": tree["method"], "the optimizer": tree["moved_by"]}
        now, then = {**now, **self.config.to_json()}, {**then, **tree["config"]}
        for name, value in now.items():
            if name not in FREE_SETTINGS and then.get(name) != value:
                raise InputError(f"the checkpoint {path} was made with {name} {then.get(name)!r}, not {value!r}")
        processes = self.accelerator.num_processes
        if len(tree["generators"]) != processes:
            raise InputError(f"the checkpoint {path} was made by {len(tree['generators'])} processes, not {processes}")
        if tree["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run began with {tree['threads']} threads and goes on with {torch.get_num_threads()}: its weights will agree with "
                "those of an unbroken run to rounding only",
                stacklevel=2,
            )

"""Balancing in the Trainer of Hugging Face's transformers.

Needs the extra ``polytask[transformers]``; importing this module takes the seconds that transformers takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from polytask.autograd import Shared
from polytask.balancing import Balancer, Observation, backward, make
from polytask.balancing.engine import Features, Level
from polytask.balancing.looks import looks_again
from polytask.errors import InputError, MissingExtraError
from polytask.training.checkpoint import load_checkpoint, save_checkpoint

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingExtraError("polytask.transformers", "transformers") from error

STATE = "polytask_balancer"


class MultiTaskTrainerMixin:
    """Lets the ``compute_loss`` of a Trainer return the losses of several tasks, and balances them.

    ::

        class TwoTasks(MultiTaskTrainerMixin, Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                outputs = model(inputs["input_ids"])
                losses = {"topic": cross_entropy(outputs["topic"], inputs["topic"]), "stars": ...}
                return (losses, outputs) if return_outputs else losses

        TwoTasks(model, args, train_dataset=..., balancer="upgrad").train()

    Precision, clipping, accumulation (each micro-batch is weighed on its own), evaluation and several processes stay the Trainer's
    business. Logged beside the Trainer's own: ``loss/TASK`` and ``weight/TASK``, means since the last log, and ``eval_loss/TASK``.
    Checkpoints hold the balancer's state, and training resumed from one goes on with it. A method that needs a second evaluation
    takes the losses of the next batch for it.

    Args:
        arguments: of the Trainer.
        balancer: a balancing method or its name.
        shared: the model -> its shared parameters; all that two losses reach when omitted.
        features: the model -> the shared representation(s) of the last forward pass, which makes the cheap level available.
        level: ``auto``, ``representation`` or ``exact``.
        options: of the Trainer.

    Raises:
        InputError: a method that looks more than once a step, which the Trainer has no place for.
    """

    def __init__(
        self,
        *arguments: Any,
        balancer: Balancer | str = "equal",
        shared: Callable[[nn.Module], Shared] | None = None,
        features: Callable[[nn.Module], Features] | None = None,
        level: Level = "auto",
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.balancer = make(balancer) if isinstance(balancer, str) else balancer
        if looks_again(self.balancer):
            raise InputError(
                f"{self.balancer.method.name} looks at the model more than once a step, for which the Trainer has no place: "
                "call polytask.backward_batches in a loop of your own"
            )
        self.shared, self.features, self.level = shared, features, level
        self.observation: Observation | None = None
        self._seen: dict[str, list[Tensor]] = {}
        self._losses: dict[str, Tensor] = {}
        self._total = torch.zeros(())
        self._trainer.add_callback(_Keeper(self.balancer))

    @property
    def _trainer(self) -> Any:
        """The Trainer that this is mixed into."""
        return self

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As the Trainer's, with the balancer's state of the checkpoint resumed from."""
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = cast(Any, get_last_checkpoint)(self._trainer.args.output_dir)
            if folder and (Path(folder) / STATE).exists():
                self.balancer.load_state_dict(load_checkpoint(Path(folder) / STATE))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)  # type: ignore[misc]

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """As the Trainer's, but for what fills the gradients."""
        accelerator = self._trainer.accelerator
        if accelerator.distributed_type.name in ("DEEPSPEED", "MEGATRON_LM"):
            raise InputError(f"gradients of single losses are not available under {accelerator.distributed_type.name}")
        plain = accelerator.backward
        accelerator.backward = self._backward
        try:
            with self._summed("loss"):
                step: Tensor = super().training_step(model, *arguments, **options)  # type: ignore[misc]
        finally:
            accelerator.backward = plain
        return step

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        """As the Trainer's, with the sum of the losses for its loss."""
        with self._summed("eval_loss"):
            return super().prediction_step(*arguments, **options)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """As the Trainer's, with the loss and the weight of each task."""
        kinds = [k for k in ("loss", "weight") if "loss" in logs] + [k for k in ("eval_loss",) if k in logs]
        for key in [k for k in self._seen if k.partition("/")[0] in kinds]:
            mean = torch.stack(self._seen.pop(key)).float().mean()
            logs[key] = float(self._trainer.accelerator.reduce(mean, "mean"))
        super().log(logs, *arguments, **options)  # type: ignore[misc]

    @contextmanager
    def _summed(self, kind: str) -> Iterator[None]:
        """For the Trainer, ``compute_loss`` returns one loss."""
        apart = self._trainer.compute_loss

        def compute_loss(*arguments: Any, **options: Any) -> Any:
            found = apart(*arguments, **options)
            losses, *outputs = found if isinstance(found, tuple) else (found,)
            if not isinstance(losses, Mapping) or not losses:
                raise InputError(
                    f"{type(self).__name__}.compute_loss returned {type(losses).__name__}: {{task: loss}} is expected"
                )
            for name, loss in losses.items():
                self._seen.setdefault(f"{kind}/{name}", []).append(loss.detach())
            self._losses = dict(losses)
            self._total = torch.stack(list(losses.values())).sum()
            return (self._total, *outputs) if outputs else self._total

        self._trainer.compute_loss = compute_loss
        try:
            yield
        finally:
            del self._trainer.compute_loss
            self._losses = {}

    def _backward(self, loss: Tensor, **_: Any) -> None:
        """Balance the losses, each multiplied by what the Trainer multiplied their sum by."""
        (factor,) = torch.autograd.grad(loss, self._total, retain_graph=True)
        accelerator = self._trainer.accelerator
        model = accelerator.unwrap_model(self._trainer.model)
        seen = self.observation = backward(
            {n: each * factor for n, each in self._losses.items()},
            shared=self.shared(model) if self.shared is not None else None,
            balancer=self.balancer,
            features=self.features(model) if self.features is not None else None,
            level=self.level,
            scaler=accelerator.scaler,
        )
        if seen.weights is not None:
            for name, w in zip(seen.tasks, seen.weights, strict=True):
                self._seen.setdefault(f"weight/{name}", []).append(w.detach())


class _Keeper(TrainerCallback):
    """Tells the balancer of epochs, and puts its state beside the Trainer's."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.balancer.begin_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_checkpoint(folder / STATE, self.balancer.state_dict())

"""Balancing in Lightning: a module that trains any multi-task model, and a callback for modules of one's own.

Needs the extra ``polytask[lightning]``; importing this module takes the seconds that Lightning takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polytask.balancing import Balancer, LossWeighting, Observation, backward, backward_batches, make
from polytask.balancing.engine import Features, Level
from polytask.balancing.looks import looks_again
from polytask.errors import InputError, MissingExtraError
from polytask.models import MultiTaskModel
from polytask.tasks import Tasks
from polytask.training.checkpoint import put_together, take_apart
from polytask.training.several_looks import cut

try:
    from lightning import pytorch as pl
except ImportError as error:
    raise MissingExtraError("polytask.lightning", "lightning") from error

Batch = tuple[Any, Mapping[str, Tensor]]


class MultiTaskModule(pl.LightningModule):
    """A LightningModule that trains a multi-task model with a balancing method.

    Optimisation is manual, as Lightning calls it, because the gradients are not those of one scalar: give ``clip_norm`` here and not to the
    Trainer. ``precision="16-mixed"`` (one scaler for all tasks), ``"bf16-mixed"`` and DDP work; under DDP at exact level the per-task
    gradients of all processes are averaged before they are balanced; all processes take the step of one with all rows.

    Logged: ``train/TASK/loss``, ``train/TASK/weight`` and ``validation/TASK/loss``.

    Args:
        model: maps inputs to ``{task: raw output}``.
        tasks: what is learnt.
        balancer: a balancing method or its name; its state is part of Lightning's checkpoints.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip_norm: greatest norm of the balanced gradient; None does not clip.
        level: ``auto``, ``representation`` or ``exact``.
        optimizer: makes another optimizer of the parameters.

    Batches are ``(inputs, {task: labels})``.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Tasks,
        *,
        balancer: Balancer | str = "equal",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        clip_norm: float | None = 1.0,
        level: Level = "auto",
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.tasks, self.level, self.clip_norm = model, tasks, level, clip_norm
        self.balancer = make(balancer) if isinstance(balancer, str) else balancer
        self.balancer.bind(list(tasks))
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=learning_rate, weight_decay=weight_decay))

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Raw outputs of all tasks."""
        outputs: dict[str, Tensor] = self.model(inputs, tasks=tuple(self.tasks))
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())

    def on_train_epoch_start(self) -> None:
        self.balancer.begin_epoch()

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        if looks_again(self.balancer):
            self._step_by_looks(batch)
            return
        inputs, targets = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        generator = torch.get_rng_state() if self.balancer.needs_second_evaluation else None
        counts = self._labelled(targets)
        losses = self.losses(inputs, targets, idle=counts is not None)
        if not losses:
            return
        observation = self._backward(losses, counts)
        if self.clip_norm is not None:
            # norms grow with float16's scale: clipping at the scaled norm leaves the unscaling to the optimizer's step
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm * self._scale())
        optimizer.step()
        if generator is not None:
            with torch.no_grad(), torch.random.fork_rng():
                torch.set_rng_state(generator)  # the same dropout masks
                self.balancer.after_step(self.losses(inputs, targets, idle=counts is not None), counts)
        self._log_step(losses, observation)

    def _step_by_looks(self, batch: Batch) -> None:
        """A method that looks at several batches gets parts of this one, none where it is too small for that."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        if self.trainer.world_size > 1:
            raise InputError(
                f"{self.balancer.method.name} looks at the model more than once a step: in several processes take polytask.train for it"
            )
        parts = cut(batch, len(self.balancer.roles))
        if not parts:
            return
        observation = backward_batches(
            lambda part: self.losses(*part),
            parts,
            shared=self.model.shared_parameters(),
            balancer=self.balancer,
            level=self.level,
            scaler=getattr(self.trainer.precision_plugin, "scaler", None),
        )
        if not observation.tasks:
            return
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm * self._scale())
        optimizer.step()
        self._log_step(dict(zip(observation.tasks, observation.losses.unbind(), strict=True)), observation)

    def _log_step(self, losses: Mapping[str, Tensor], observation: Observation) -> None:
        self.log_dict({f"train/{n}/loss": loss.detach() for n, loss in losses.items()})
        if observation.weights is not None:
            self.log_dict({f"train/{n}/weight": w for n, w in zip(observation.tasks, observation.weights, strict=True)})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        inputs, targets = batch
        losses = self.losses(inputs, targets)
        self.log_dict(
            {f"validation/{n}/loss": loss for n, loss in losses.items()}, batch_size=len(next(iter(targets.values())))
        )

    def losses(self, inputs: Any, targets: Mapping[str, Tensor], idle: bool = False) -> dict[str, Tensor]:
        """Mean loss of every task labelled in the batch, in float32; with ``idle`` zeros, with graph, for the others."""
        outputs = {n: o.float() for n, o in self(inputs).items()}
        losses = self.tasks.losses(outputs, targets)
        return {n: losses[n] if n in losses else outputs[n].sum() * 0.0 for n in self.tasks} if idle else losses

    def _labelled(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The labels of each task in this process's batch, where there are several processes."""
        if self.trainer.world_size == 1:
            return None
        return {
            n: t.kind.labelled(targets[n]).sum() if n in targets else torch.zeros(()) for n, t in self.tasks.items()
        }

    def _backward(self, losses: dict[str, Tensor], counts: dict[str, Tensor] | None) -> Observation:
        exact = self.level == "exact" or (
            self.level == "auto" and (not self.model.features or self.balancer.remembers_gradients)
        )
        at_parameters = exact and not isinstance(self.balancer, LossWeighting)
        if not at_parameters:
            self.trainer.strategy.pre_backward(torch.stack(list(losses.values())).sum())
        return backward(
            losses,
            shared=self.model.shared_parameters() if at_parameters and len(losses) == len(self.tasks) else None,
            balancer=self.balancer,
            features=self.model.features or None,
            level=self.level,
            scaler=getattr(self.trainer.precision_plugin, "scaler", None),
            counts=counts,
        )

    def _scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # as a text and tensors, which torch.load reads without unpickling objects
        checkpoint["polytask_balancer"] = take_apart(self.balancer.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.balancer.load_state_dict(put_together(*checkpoint["polytask_balancer"]))


class Balancing(pl.Callback):
    """Puts a balancing method into a LightningModule of one's own, which keeps its automatic optimisation.

    The module's ``training_step`` leaves the losses apart in an attribute and returns their sum, as it would without this::

        self.task_losses = {"depth": depth_loss, "normals": normals_loss}
        return sum(self.task_losses.values())

    Clipping, precision, accumulation (each micro-batch is weighed on its own) and DDP stay the Trainer's business.

    Args:
        balancer: a balancing method or its name; its state is part of Lightning's checkpoints.
        losses: name of the attribute that holds ``{task: loss}``.
        shared: the module -> its shared parameters; all that two losses reach when omitted.
        features: the module -> the shared representation(s) of the last forward pass, which makes the cheap level available.
        level: ``auto``, ``representation`` or ``exact``.

    Raises:
        InputError: a method that looks more than once a step, which automatic optimisation has no place for.
    """

    def __init__(
        self,
        balancer: Balancer | str,
        *,
        losses: str = "task_losses",
        shared: Callable[[pl.LightningModule], Iterable[Tensor]] | None = None,
        features: Callable[[pl.LightningModule], Features] | None = None,
        level: Level = "auto",
    ) -> None:
        super().__init__()
        self.balancer = make(balancer) if isinstance(balancer, str) else balancer
        if looks_again(self.balancer):
            raise InputError(
                f"{self.balancer.method.name} looks at the model more than once a step, for which automatic optimisation has no place: "
                "use polytask.lightning.MultiTaskModule, or polytask.backward_batches in a module that optimises by hand"
            )
        self.losses, self.shared, self.features, self.level = losses, shared, features, level
        self.observation: Observation | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise InputError(
                f"{type(pl_module).__name__} optimises by hand: call polytask.backward in its training_step instead"
            )
        exact = self.level == "exact" or (self.level == "auto" and self.features is None)
        if trainer.world_size > 1 and exact and not isinstance(self.balancer, LossWeighting):
            raise InputError(
                "per-task gradients at exact level in several processes need polytask.lightning.MultiTaskModule; or give features="
            )

        def balanced(*_: Any, **__: Any) -> None:
            self._backward(trainer, pl_module)

        pl_module.backward = balanced  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        pl_module.__dict__.pop("backward", None)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self.balancer.begin_epoch()

    def _backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        losses: Mapping[str, Tensor] | None = getattr(module, self.losses, None)
        if not losses:
            raise InputError(
                f"{type(module).__name__}.training_step left no losses in self.{self.losses}: {{task: loss}} is expected there"
            )
        self.observation = backward(
            {n: each / trainer.accumulate_grad_batches for n, each in losses.items()},
            shared=self.shared(module) if self.shared is not None else None,
            balancer=self.balancer,
            features=self.features(module) if self.features is not None else None,
            level=self.level,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        setattr(module, self.losses, None)  # lets the graph go

    def state_dict(self) -> dict[str, Any]:
        shape, tensors = take_apart(self.balancer.state_dict())
        return {"shape": shape, "tensors": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.balancer.load_state_dict(put_together(state_dict["shape"], state_dict["tensors"]))

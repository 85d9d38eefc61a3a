"""One optimizer step: micro-batches -> losses -> balanced gradients -> clip -> update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.autograd import leaves
from polytask.balancing import Balancer, LossWeighting, Observation, backward, backward_batches
from polytask.balancing.accumulation import Accumulation
from polytask.balancing.looks import looks_again
from polytask.errors import TrainingError
from polytask.models import MultiTaskModel
from polytask.optim import TaskOptimizer
from polytask.tasks import Tasks
from polytask.training.config import TrainConfig
from polytask.training.data import Batch, to_device
from polytask.training.several_looks import check_looks, cut

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves for the logs, still on the device: losses of ``tasks``; weights and gradient norms of ``weighed``."""

    tasks: tuple[str, ...]
    losses: Tensor
    weighed: tuple[str, ...]
    weights: Tensor | None
    norms: Tensor | None


@dataclass(frozen=True)
class Counts:
    """Labelled rows of a step, shape (pieces, tasks), float64.

    Attributes:
        here: in this process.
        everywhere: in all of them.
    """

    here: Tensor
    everywhere: Tensor

    @property
    def shares(self) -> Tensor:
        """Of the step's labelled rows, those of each piece of this process, shape (pieces, tasks)."""
        return self.here / self.everywhere.sum(0).clamp_min(1)

    def of_piece(self, i: int) -> Tensor:
        """What the mean loss over a piece, of all processes, is multiplied by so that the mean over pieces is the step's loss."""
        return self.everywhere[i] * (len(self.everywhere) / self.everywhere.sum(0).clamp_min(1))


class Stepper:
    """Takes optimizer steps.

    Args:
        model: as prepared by accelerate (perhaps wrapped for several processes).
        tasks: what is learnt.
        balancer: bound to all tasks.
        optimizer: as prepared by accelerate.
        accelerator: device, precision, processes.
        config: accumulate, clip_norm, level and norms_every are read.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tasks: Tasks,
        balancer: Balancer,
        optimizer: Any,
        accelerator: Accelerator,
        config: TrainConfig,
    ) -> None:
        self.model, self.tasks, self.balancer, self.optimizer = model, tasks, balancer, optimizer
        self.accelerator, self.config = accelerator, config
        self.module: MultiTaskModel = accelerator.unwrap_model(model)
        self.processes = accelerator.num_processes
        self._has_features: bool | None = None
        self._looks_again = looks_again(balancer)
        if self._looks_again:
            check_looks(balancer, config, isinstance(optimizer.optimizer, TaskOptimizer))
        # accelerate's wrapper searches the disk for a package in every step: where it adds nothing the optimizer itself is stepped
        plain = accelerator.scaler is None and accelerator.distributed_type.name in ("NO", "MULTI_CPU", "MULTI_GPU")
        self._update = optimizer.optimizer if plain else optimizer
        self._by_itself: TaskOptimizer | None = (
            optimizer.optimizer if isinstance(optimizer.optimizer, TaskOptimizer) else None
        )

    def __call__(self, pieces: Sequence[Batch], number: int) -> StepRecord | None:
        """Take step ``number`` of an epoch, counted from 0; None where no row of it has a label.

        Raises:
            TrainingError: a loss or gradient that is not finite; the message names the task.
        """
        pieces = [
            (to_device(inputs, self.accelerator.device), to_device(targets, self.accelerator.device))
            for inputs, targets in pieces
        ]
        counts = self._counts(pieces)
        shares = None if counts is None else [dict(zip(self.tasks, row, strict=True)) for row in counts.shares.tolist()]
        self._update.zero_grad()
        generators: list[Tensor] = []
        if self._looks_again:
            losses, observation = self._by_looks(pieces[0])
        elif self._by_itself is not None:
            losses, observation = self._by_the_optimizer(self._by_itself, pieces, shares, generators)
        elif (len(pieces) > 1 or self.processes > 1) and self._exact(pieces[0]):
            losses, observation = self._accumulate(pieces, shares, generators)
        else:
            losses, observation = self._piecewise(pieces, counts, generators, number % self.config.norms_every == 0)
        if observation is None:
            return None
        self._clip()
        self._update.step()
        if self.balancer.needs_second_evaluation:
            self._evaluate_again(pieces, shares, generators)
        C = observation.gramian
        norms = None if C is None else C.diagonal().clamp_min(0).sqrt()
        return StepRecord(
            tuple(losses), torch.stack(list(losses.values())), observation.tasks, observation.weights, norms
        )

    def _counts(self, pieces: Sequence[Batch]) -> Counts | None:
        """The labelled rows of the step; None where there is but one piece of it."""
        if len(pieces) == 1 and self.processes == 1:
            return None
        here = torch.stack([torch.stack(list(self._labelled(piece).values())) for piece in pieces]).double()
        return Counts(here, self.accelerator.reduce(here.clone(), "sum"))

    def _exact(self, piece: Batch) -> bool:
        """Whether gradients are taken at the parameters, so that pieces can be added up before they are balanced."""
        if self.config.level != "auto":
            return self.config.level == "exact"
        if isinstance(self.balancer, LossWeighting):
            return False
        if self.balancer.remembers_gradients:
            return True
        if self._has_features is None:  # a look in evaluation mode, which draws no random number
            self.module.eval()
            self.module(piece[0])
            self.module.train()
            self._has_features = bool(self.module.features)
        return not self._has_features

    def _by_looks(self, piece: Batch) -> tuple[dict[str, Tensor], Observation | None]:
        """A method that looks again finds its gradients on parts of the batch; None where it is too small for them, or lacks labels."""
        parts = cut(piece, len(self.balancer.roles))
        if not parts and self.processes == 1:
            return {}, None
        several = self.processes > 1
        if several and not self._everyone_has(parts):
            return {}, None
        observation = backward_batches(
            lambda part: self._losses(self.module, part, None, idle=several),
            parts,
            shared=self.module.shared_parameters(),
            balancer=self.balancer,
            scaler=self.accelerator.scaler,
            counts=self._labelled if several else None,
        )
        losses = dict(zip(observation.tasks, observation.losses.unbind(), strict=True))
        return losses, observation if losses else None

    def _labelled(self, part: Batch) -> dict[str, Tensor]:
        """This process's labels of each task."""
        none = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        return {n: t.kind.labelled(part[1][n]).sum() if n in part[1] else none for n, t in self.tasks.items()}

    def _everyone_has(self, parts: Sequence[Batch]) -> bool:
        """Whether no process has too few rows for its parts, and no part is without any label in all processes."""
        n = len(self.balancer.roles)
        labels = [torch.stack(list(self._labelled(part).values())).sum() for part in parts]
        mine = torch.stack([*labels, torch.ones_like(labels[0])]) if parts else torch.zeros(n + 1, dtype=torch.int64)
        found = self.accelerator.reduce(mine.to(self.accelerator.device), "sum").tolist()
        return found[-1] == self.processes and all(found[:-1])

    def _losses(
        self, model: torch.nn.Module, piece: Batch, factors: dict[str, float] | None, idle: bool = False
    ) -> dict[str, Tensor]:
        """The losses of a piece, each times its factor; with ``idle`` zeros, with graph, for tasks without label."""
        outputs = model(piece[0], tasks=tuple(self.tasks))
        losses = self.tasks.losses(outputs, piece[1])
        if factors is not None:
            losses = {n: loss * factors[n] for n, loss in losses.items()}
        return {n: losses[n] if n in losses else outputs[n].sum() * 0.0 for n in self.tasks} if idle else losses

    def _piecewise(
        self, pieces: Sequence[Batch], counts: Counts | None, generators: list[Tensor], observe: bool
    ) -> tuple[dict[str, Tensor], Observation | None]:
        """Balance every micro-batch on its own and take the mean of the gradients; each loss is scaled to be unbiased for the step's."""
        total: dict[str, Tensor] = {}
        observation: Observation | None = None
        several = self.processes > 1
        for i, piece in enumerate(pieces):
            self._remember(generators)
            factors = None if counts is None else dict(zip(self.tasks, counts.of_piece(i).tolist(), strict=True))
            last = i + 1 == len(pieces)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self._losses(self.model, piece, factors, idle=several)
                if losses and (counts is None or bool(counts.everywhere[i].any())):
                    observation = backward(
                        losses,
                        shared=self._shared(losses),
                        balancer=self.balancer,
                        features=self.module.features or None,
                        level=self.config.level,
                        scaler=self.accelerator.scaler,
                        observe=observe,
                        counts=dict(zip(self.tasks, counts.here[i].tolist(), strict=True))
                        if counts and several
                        else None,
                    )
            labelled = (
                losses if counts is None else [n for n, c in zip(self.tasks, counts.here[i].tolist(), strict=True) if c]
            )
            for n in labelled:
                loss = losses[n]
                total[n] = total[n] + loss.detach() / len(pieces) if n in total else loss.detach() / len(pieces)
        if len(pieces) > 1:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / len(pieces))
        return total, observation

    def _by_the_optimizer(
        self,
        optimizer: TaskOptimizer,
        pieces: Sequence[Batch],
        shares: list[dict[str, float]] | None,
        generators: list[Tensor],
    ) -> tuple[dict[str, Tensor], Observation | None]:
        """Tell the optimizer the losses of every micro-batch, scaled so that they add up to the step's."""
        total: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            self._remember(generators)
            losses = self._losses(self.model, piece, shares[i] if shares else None)
            if losses:
                found = optimizer.backward(losses, balancer=self.balancer, scaler=self.accelerator.scaler)
                weights.update(zip(losses, found, strict=True))
            for n, loss in losses.items():
                total[n] = total[n] + loss.detach() if n in total else loss.detach()
        if not total:
            return {}, None
        self.balancer.observation = Observation(
            tuple(total), torch.stack(list(total.values())), torch.stack([weights[n] for n in total]), None, "exact"
        )
        return total, self.balancer.observation

    def _accumulate(
        self, pieces: Sequence[Batch], shares: list[dict[str, float]] | None, generators: list[Tensor]
    ) -> tuple[dict[str, Tensor], Observation | None]:
        """Add up the Jacobians of all micro-batches and processes and balance once, as if they were one batch."""
        scaler = self.accelerator.scaler
        scale = float(scaler.scale(torch.ones(()))) if scaler is not None else 1.0
        whole = Accumulation(self.balancer, tuple(self.tasks), self.module.shared_parameters(), scale)
        for i, piece in enumerate(pieces):
            self._remember(generators)
            whole.add(self._losses(self.module, piece, shares[i] if shares else None))
        if self.processes > 1:
            whole.reduce()
        if not bool(whole.present.any()):
            return {}, None
        observation = whole.backward()
        if self.processes > 1:
            self._share_own_gradients()
        return {n: whole.losses[k] for k, n in enumerate(self.tasks) if whole.present[k]}, observation

    def _share_own_gradients(self) -> None:
        """Task parameters got the gradient of this process's rows only: add the others'."""
        shared = {id(p) for p in self.module.shared_parameters()}
        for p in self.module.parameters():
            if id(p) not in shared and p.requires_grad:
                mine = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = self.accelerator.reduce(mine, "sum")

    def _shared(self, losses: dict[str, Tensor]) -> list[Tensor] | None:
        at_features = self.config.level == "representation" or (
            self.config.level == "auto" and self.module.features and not self.balancer.remembers_gradients
        )
        if isinstance(self.balancer, LossWeighting) or at_features:
            return None  # no gradient is taken at them: a trunk may have parameters that nothing uses
        shared: list[Tensor] = list(self.module.shared_parameters())
        if len(losses) == len(self.tasks):
            return shared
        reached = {id(p) for loss in losses.values() for p in leaves(loss)}
        return [p for p in shared if id(p) in reached]

    def _clip(self) -> None:
        if self.config.clip_norm is None:
            return
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        # under float16 an overflow is the scaler's business: it skips the step and lowers the scale
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise TrainingError(
                "the gradient of the balanced losses is not finite although every loss is: the step was not taken"
            )

    def _remember(self, generators: list[Tensor]) -> None:
        if self.balancer.needs_second_evaluation:
            generators.append(torch.get_rng_state())

    @torch.no_grad()
    def _evaluate_again(
        self, pieces: Sequence[Batch], shares: list[dict[str, float]] | None, generators: list[Tensor]
    ) -> None:
        """The same batch with the same dropout masks after the update; of several pieces balanced apart, the last."""
        whole = len(pieces) > 1 and self._exact(pieces[0])
        first = 0 if whole else len(pieces) - 1
        # the balancer takes the mean over processes
        times = float(self.processes if whole else len(pieces) * self.processes)
        total: dict[str, Tensor] = {}
        with torch.random.fork_rng():
            for i in range(first, len(pieces)):
                torch.set_rng_state(generators[i])
                factors = {n: share * times for n, share in shares[i].items()} if shares else None
                for n, loss in self._losses(self.module, pieces[i], factors, idle=self.processes > 1).items():
                    total[n] = total[n] + loss if n in total else loss
        self.balancer.after_step(total)


def table_of(records: Sequence[StepRecord], tasks: Sequence[str]) -> npt.NDArray[np.float64]:
    """Records as one array (steps, 3, tasks) of losses, weights and gradient norms, NaN where unknown; one transfer from the device."""
    table = np.full((len(records), 3, len(tasks)), np.nan)
    if not records:
        return table
    at = {n: k for k, n in enumerate(tasks)}
    parts: list[Tensor] = []
    places: list[tuple[int, int, list[int]]] = []
    for s, r in enumerate(records):
        for row, names, values in ((0, r.tasks, r.losses), (1, r.weighed, r.weights), (2, r.weighed, r.norms)):
            if values is not None:
                parts.append(values.to(r.losses))
                places.append((s, row, [at[n] for n in names]))
    flat = torch.cat(parts).double().cpu().numpy()
    begin = 0
    for s, row, columns in places:
        table[s, row, columns] = flat[begin : begin + len(columns)]
        begin += len(columns)
    return table

"""Every setting of a training run, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from polytask.errors import InputError

Schedule = Literal["constant", "cosine"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; JSON-ready through :meth:`to_json`.

    Args:
        epochs: passes over the training rows at most.
        batch_size: rows of a micro-batch in one process; a step sees ``batch_size * accumulate * processes`` rows.
        learning_rate: of AdamW; of any optimizer given, its own groups' rates are used instead.
        weight_decay: of AdamW, decoupled.
        schedule: ``constant``, or ``cosine``: down to 0 at the last step; both after the warm-up.
        warmup: share of all steps over which the rate grows linearly from 0.
        patience: epochs without a better score before training stops; None never stops early.
        stop_on: what is to get better: ``delta_m`` (:func:`~polytask.training.evaluation.explained_share` averaged over tasks), the
            name of a task (its primary metric), or None: the last epoch's weights are kept and nothing stops early.
        accumulate: micro-batches a step. At ``level="exact"`` the step is that of one big batch for every method; at the other
            levels each micro-batch is weighed on its own (the same for ``equal``, an approximation for others, much cheaper).
        clip_norm: greatest Euclidean norm of the whole update gradient, after balancing; None does not clip.
        precision: ``no`` (float32), ``bf16`` or ``fp16`` autocast; the gradient scaler of ``fp16`` is one for all tasks.
        level: where per-task gradients are taken: ``auto``, ``representation`` or ``exact`` (:func:`polytask.backward`).
        seed: of every random number of the run: order of rows, dropout, the balancer's own.
        norms_every: steps between looks at the gradient norms where the method does not need them; the first step of an epoch has one.
        observe_every: epochs between diagnoses of interference (:mod:`polytask.training.diagnosis`); 0 makes none.
        checkpoint_every: steps between checkpoints within an epoch; 0 writes them at the ends of epochs only.
        device: ``auto`` (what accelerate finds), ``cpu``, ``cuda`` or ``mps``.

    Raises:
        InputError: a setting out of its range; the message names it.
    """

    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    schedule: Schedule = "constant"
    warmup: float = 0.0
    patience: int | None = 10
    stop_on: str | None = "delta_m"
    accumulate: int = 1
    clip_norm: float | None = 1.0
    precision: Precision = "no"
    level: Literal["auto", "representation", "exact"] = "auto"
    seed: int = 0
    norms_every: int = 10
    observe_every: int = 0
    checkpoint_every: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("norms_every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("observe_every", "checkpoint_every", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, as {getattr(self, name)} is")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is a share of all steps from 0 to below 1, not {self.warmup}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1 epoch, or None, not {self.patience}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be positive, or None, not {self.clip_norm}")
        allowed = {
            "schedule": ("constant", "cosine"),
            "precision": ("no", "bf16", "fp16"),
            "level": ("auto", "representation", "exact"),
            "device": ("auto", "cpu", "cuda", "mps"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def rate_factor(self, step: int, steps: int | None) -> float:
        """What the learning rate is multiplied by in the given step (counted from 0) of all ``steps`` (None where unknown)."""
        if steps is None:
            return 1.0
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    def to_json(self) -> dict[str, Any]:
        """All settings by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """Read back what :meth:`to_json` wrote.

        Raises:
            InputError: a setting that does not exist.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise InputError(f"there is no training setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
        return cls(**settings)

    def but(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed."""
        return replace(self, **changes)

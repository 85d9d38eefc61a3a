"""Kinds of task: what a head puts out, the loss of each example, how outputs are read, what a missing label looks like.

Every kind maps raw head outputs ``prediction`` of shape (batch, output_size) and labels ``target`` to **one loss per
example**, shape (batch,), never negative, so that masks, weights, geometric means and logarithms of losses are
possible. Labels stay in the user's own units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from polytask.tasks import metric as m
from polytask.tasks.metric import Metric


@dataclass(frozen=True)
class Kind(ABC):
    """What the tasks of one kind have in common."""

    name: ClassVar[str]

    @property
    def output_size(self) -> int:
        """How many numbers a head puts out for each example."""
        return 1

    @property
    def target_dtype(self) -> torch.dtype:
        """The dtype labels are held in: floats carry NaN for a missing label, integers -1 (or -100)."""
        return torch.float32

    def labelled(self, target: Shaped[Tensor, "batch *rest"]) -> Bool[Tensor, " batch"]:
        """Which examples have a label."""
        known = ~torch.isnan(target) if target.is_floating_point() else target >= 0
        return known.flatten(1).any(1) if known.ndim > 1 else known

    @abstractmethod
    def loss(
        self, prediction: Float[Tensor, "batch *outputs"], target: Shaped[Tensor, "batch *rest"]
    ) -> Float[Tensor, " batch"]:
        """The loss of each labelled example, at least 0."""

    @abstractmethod
    def decode(self, prediction: Float[Tensor, "batch *outputs"]) -> dict[str, Tensor]:
        """Read raw outputs: ``prediction`` in the target's units or as class index, and ``probability`` where there is one."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """What the kind is judged by unless told otherwise, the primary metric first."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description that :func:`kind_from_json` reads back."""
        return {"kind": self.name, **asdict(self)}


def _column(prediction: Tensor) -> Tensor:
    return prediction.squeeze(-1) if prediction.ndim > 1 else prediction


@dataclass(frozen=True)
class Binary(Kind):
    """Yes or no: targets 0/1 (float, NaN = missing), one logit, cross entropy in nats."""

    name: ClassVar[str] = "binary"

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        logit = _column(prediction)
        return F.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none")

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        p = torch.sigmoid(_column(prediction))
        return {"prediction": (p >= 0.5).to(torch.int64), "probability": p}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("roc_auc", m.roc_auc, True, "probability"),
            Metric("average_precision", m.average_precision, True, "probability"),
            Metric("log_loss", m.log_loss, False, "probability"),
        )


@dataclass(frozen=True)
class Multiclass(Kind):
    """One of C classes: targets 0..C-1 (int64, negative = missing), C logits, cross entropy in nats."""

    n_classes: int
    name: ClassVar[str] = "multiclass"

    @property
    def output_size(self) -> int:
        return self.n_classes

    @property
    def target_dtype(self) -> torch.dtype:
        return torch.int64

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target.long(), reduction="none")

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        return {"prediction": prediction.argmax(-1), "probability": prediction.softmax(-1)}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("accuracy", m.accuracy, True),
            Metric("macro_f1", m.macro_f1, True),
            Metric("log_loss", m.log_loss, False, "probability"),
        )


@dataclass(frozen=True)
class Multilabel(Kind):
    """Several yes/no labels at once: targets (batch, labels) of 0/1/NaN, cross entropy averaged over the labels that are known."""

    n_labels: int
    name: ClassVar[str] = "multilabel"

    @property
    def output_size(self) -> int:
        return self.n_labels

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        known = ~torch.isnan(target)
        each = F.binary_cross_entropy_with_logits(
            prediction, target.nan_to_num(0.0).to(prediction.dtype), reduction="none"
        )
        return (each * known).sum(-1) / known.sum(-1).clamp_min(1)

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        p = torch.sigmoid(prediction)
        return {"prediction": (p >= 0.5).to(torch.int64), "probability": p}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("roc_auc", m.roc_auc, True, "probability"), Metric("log_loss", m.log_loss, False, "probability"))


@dataclass(frozen=True)
class Regression(Kind):
    """A real number y: the head predicts (y - center) / scale and is charged the squared error of that, dimensionless."""

    center: float = 0.0
    scale: float = 1.0
    name: ClassVar[str] = "regression"

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (_column(prediction) - (target - self.center) / self.scale) ** 2

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        return {"prediction": _column(prediction) * self.scale + self.center}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("rmse", m.rmse, False), Metric("mae", m.mae, False), Metric("r2", m.r2, True, ratio_scale=False))


@dataclass(frozen=True)
class Quantile(Kind):
    """Quantiles of a real number: one output a quantile, pinball loss summed over them, in units of ``scale``."""

    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)
    center: float = 0.0
    scale: float = 1.0
    name: ClassVar[str] = "quantile"

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        if not self.quantiles or not all(0 < q < 1 for q in self.quantiles):
            raise ValueError(f"quantiles lie strictly between 0 and 1, not {self.quantiles}")

    @property
    def output_size(self) -> int:
        return len(self.quantiles)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        q = prediction.new_tensor(self.quantiles)
        error = ((target - self.center) / self.scale)[:, None] - prediction
        return torch.maximum(q * error, (q - 1) * error).sum(-1)

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        # sorting never increases the pinball loss and removes crossing quantiles
        return {"prediction": prediction.sort(-1).values * self.scale + self.center}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("pinball", m.pinball(self.quantiles), False),)


@dataclass(frozen=True)
class Count(Kind):
    """How many times: targets 0, 1, 2, ... (float, NaN = missing), rate = mean * exp(output), half the Poisson deviance."""

    mean: float = 1.0
    name: ClassVar[str] = "count"

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        log_rate = _column(prediction) + torch.as_tensor(self.mean).log()
        return torch.xlogy(target, target) - target * log_rate - target + log_rate.exp()

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        return {"prediction": self.mean * _column(prediction).exp()}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("poisson_deviance", m.poisson_deviance, False), Metric("mae", m.mae, False))


@dataclass(frozen=True)
class Ordinal(Kind):
    r"""One of C ordered classes: targets 0..C-1 (int64, negative = missing), cumulative logits.

    .. math:: \operatorname{logit} P(y > k) = a - \sum_{j \le k} \operatorname{softplus}(b_j), \quad k = 0..C-2

    with a the first output and b the others, so that the probabilities are ordered for any output.
    """

    n_classes: int
    name: ClassVar[str] = "ordinal"

    @property
    def output_size(self) -> int:
        return self.n_classes - 1

    @property
    def target_dtype(self) -> torch.dtype:
        return torch.int64

    def cumulative_logits(self, prediction: Float[Tensor, "batch outputs"]) -> Float[Tensor, "batch outputs"]:
        """logit P(y > k) for k = 0..C-2, decreasing in k."""
        steps = torch.cat([prediction[:, :1], -F.softplus(prediction[:, 1:])], dim=1)
        return steps.cumsum(1)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        logits = self.cumulative_logits(prediction)
        above = (target[:, None] > torch.arange(self.n_classes - 1, device=target.device)).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, above, reduction="none").mean(1)

    def decode(self, prediction: Tensor) -> dict[str, Tensor]:
        above = torch.sigmoid(self.cumulative_logits(prediction))
        edge = torch.ones_like(above[:, :1])
        probability = torch.cat([edge, above], 1) - torch.cat([above, torch.zeros_like(edge)], 1)
        return {"prediction": (above >= 0.5).sum(1), "probability": probability}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("mae", m.mae, False),
            Metric("accuracy", m.accuracy, True),
            Metric("log_loss", m.log_loss, False, "probability"),
            Metric("quadratic_kappa", m.quadratic_kappa, True, ratio_scale=False),
        )


KINDS: dict[str, type[Kind]] = {
    k.name: k for k in (Binary, Multiclass, Multilabel, Regression, Quantile, Count, Ordinal)
}


def kind_from_json(description: dict[str, Any]) -> Kind:
    """Read back what :meth:`Kind.to_json` wrote."""
    options = dict(description)
    return KINDS[options.pop("kind")](**options)

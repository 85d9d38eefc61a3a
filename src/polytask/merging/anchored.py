"""What mergers share that pull every linear layer towards an anchor, another merge; see :mod:`polytask.merging.posterior`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Unpack

import torch

from polytask.errors import InputError
from polytask.merging.base import Merger, Place, TaskVectorMerger, TaskVectorOptions, in_range, per_expert
from polytask.merging.in_memory import make
from polytask.merging.posterior import JITTER, Posterior

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class AnchorOptions(TaskVectorOptions, total=False):
    """What every merger with an anchor takes; see :class:`AnchoredMerger`."""

    strength: float
    anchor: str | Merger
    anchor_scale: float | None
    bias: bool
    jitter: float


class AnchoredMerger(TaskVectorMerger):
    r"""The posterior mean of each linear layer, its bias as one more column of the weight; elsewhere the anchor's value.

    .. math:: W = W_0 + \gamma D, \qquad D = \Bigl(\sum_k c_k D_k G_k + \lambda s D_a\Bigr) (S + \lambda s I)^{-1}

    Args:
        strength: :math:`\lambda`, of the anchor; 0 is regression alone, large values are the anchor.
        anchor: the name of any merger, whose result :math:`W_0 + D_a` is; or one that was made with options.
        anchor_scale: the anchor's ``scale``; its own default when omitted.
        bias: fit weight and bias together; otherwise biases are the anchor's. Together, models are read twice more.
        jitter: added to the strength.

    ``scale`` is :math:`\gamma`, ``weights`` are :math:`c`.
    """

    weighs_itself = True
    scratch = 8.0
    scratch_per_expert = 1.0

    def __init__(
        self,
        *,
        strength: float = 0.1,
        anchor: str | Merger = "task_arithmetic",
        anchor_scale: float | None = None,
        bias: bool = True,
        jitter: float = JITTER,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        in_range(strength, "the strength of the anchor", 0, float("inf"))
        in_range(jitter, "the jitter", 0, float("inf"))
        if isinstance(anchor, str):
            anchor = make(anchor, **({} if anchor_scale is None else {"scale": anchor_scale}))
        elif anchor_scale is not None:
            raise InputError("an anchor that was made already has its scale")
        if anchor.needs == "statistics" and anchor.statistic != self.statistic:
            raise InputError(f"{anchor.method.name} cannot be the anchor: its statistics are not gathered here")
        self.strength, self.anchor, self.bias, self.jitter = strength, anchor, bias, jitter
        self.kept = {}
        self.surveyed = 0

    @property
    def passes(self) -> int:  # type: ignore[override]
        """The anchor's, then one that collects biases and one that fits."""
        return self.anchor.passes + 2 * self.bias

    def begin(self) -> None:
        self.surveyed = 0
        self.anchor.kept = self.kept
        self.anchor.begin()

    def end_pass(self) -> None:
        if self.surveyed < self.anchor.passes:
            self.anchor.end_pass()
        self.surveyed += 1

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:
        ready = self.surveyed - self.anchor.passes
        if ready < 0:
            self.anchor.survey(W0, D, place)
        elif f"{place.name}/fitted" in self.kept:
            return
        elif ready == 0 and D.ndim == 2 and place.name.endswith("bias"):
            self.kept[f"{place.name}/experts"] = D.clone()
            self.kept[f"{place.name}/anchor"] = self.anchored(W0, D, place)
        elif ready == 1 and self.fits(D, place) and self._has_bias(D, place):
            bias = bias_of(place.name)
            both = torch.cat([D, self.kept[f"{bias}/experts"][..., None]], 2)
            anchor = torch.cat([self.anchored(W0, D, place), self.kept[f"{bias}/anchor"][:, None]], 1)
            fitted = self.posterior(both, anchor, place, bias=True).mean(self.strength, self.jitter).to(D.dtype)
            self.kept[f"{place.name}/fitted"], self.kept[f"{bias}/fitted"] = (
                fitted[:, :-1].clone(),
                fitted[:, -1].clone(),
            )

    def _has_bias(self, D: Float[Tensor, "experts m d"], place: Place) -> bool:
        """Whether a bias belongs to the rows; layers that hold their weight transposed have one of another length."""
        experts = self.kept.get(f"{bias_of(place.name)}/experts")
        return experts is not None and experts.shape == D.shape[:2]

    def add_to_base(self, W0: Tensor, D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if f"{place.name}/fitted" in self.kept:
            return W0.add_(self.kept[f"{place.name}/fitted"], alpha=self.scale)
        return W0.add_(self.update(W0, D, place), alpha=self.scale if self.fits(D, place) else 1.0)

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        anchor = self.anchored(W0, D, place)
        if not self.fits(D, place):
            return anchor
        return self.posterior(D, anchor, place, bias=False).mean(self.strength, self.jitter).to(D.dtype)

    def anchored(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        """The anchor's update of a tensor; the arguments are left as they are."""
        if isinstance(self.anchor, TaskVectorMerger):
            return self.anchor.add_to_base(W0.clone(), D.clone(), place).sub_(W0)
        return self.anchor.merge(None, D + W0, place) - W0

    def posterior(
        self, D: Float[Tensor, "experts m d"], anchor: Float[Tensor, "m d"], place: Place, *, bias: bool
    ) -> Posterior:
        """The sums of one layer."""
        c = per_expert(self.weights, len(D), "weights")
        return Posterior.of(D, self.moments(D, place, bias=bias), c, anchor)

    @abstractmethod
    def fits(self, D: Float[Tensor, "experts ..."], place: Place) -> bool:
        """Whether this tensor is the weight of a linear layer that can be fitted."""

    @abstractmethod
    def moments(self, D: Float[Tensor, "experts m d"], place: Place, *, bias: bool) -> Iterable[Float[Tensor, "d d"]]:
        """G of each expert."""


def bias_of(weight: str) -> str:
    """The name of the bias that belongs to a weight: ``fc.bias`` for ``fc.weight``, ``in_proj_bias`` for ``in_proj_weight``."""
    return weight.removesuffix("weight") + "bias"

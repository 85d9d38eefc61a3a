"""AdaMerging (Yang et al., ICLR 2024, arXiv:2310.02575)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.adaptive import Adaptive, Bench, settle
from polytask.merging.base import in_range
from polytask.registry import register


@register("adamerging", family="merging", paper="arXiv:2310.02575", needs="inputs", aliases=("AdaMerging",))
class AdaMerging(Adaptive):
    r"""Learn how much of each task vector to add, so that the merged model is sure of its answers on unlabelled inputs.

    .. math:: W^l = W_0^l + \sum_t \lambda_t^l\, \tau_t^l, \qquad
        \min_{\lambda \in [0, 1]}\ \sum_t \mathbb E_x\, H\bigl(p_W(\cdot \mid x)\bigr)

    Low entropy is a stand-in for low loss; where a model is surely wrong it misleads, and ``labels`` learns from the loss itself.
    With the filter ``trim`` before it it is AdaMerging++ but for the election of signs.

    Args:
        wise: ``layer`` learns a coefficient for every tensor and expert, ``task`` one for every expert.
        start: :math:`\lambda` at first.
        steps: of Adam, each on one batch of every task; the paper's batches are of 16 inputs, drawn from all it has.
        learning_rate: of Adam; a coefficient reaches as far as it times the steps.
        labels: take batches of inputs and labels and descend their cross-entropy, which the paper does not.

    Cost: a forward and a backward pass a step and task.
    """

    def __init__(
        self,
        *,
        wise: Literal["layer", "task"] = "layer",
        start: float = 0.3,
        steps: int = 500,
        learning_rate: float = 1e-3,
        labels: bool = False,
    ) -> None:
        if wise not in ("layer", "task"):
            raise InputError(f"adamerging learns coefficients 'layer'- or 'task'-wise, not {wise!r}")
        in_range(start, "the start of adamerging", 0, 1)
        in_range(learning_rate, "the learning rate of adamerging", 0, float("inf"), open_low=True)
        in_range(steps, "the number of steps of adamerging", 0, float("inf"))
        self.wise, self.start, self.steps, self.learning_rate = wise, start, steps, learning_rate
        self.takes_labels = labels

    def fit(self, bench: Bench) -> dict[str, Tensor]:
        T, names = len(bench.batches), list(bench.W0)
        lam = torch.full((len(names) if self.wise == "layer" else 1, T), self.start, requires_grad=True)

        def merged() -> dict[str, Tensor]:
            rows = lam.expand(len(names), T)
            return {
                n: bench.W0[n] + torch.tensordot(rows[i].to(bench.D[n].dtype), bench.D[n], dims=1)
                for i, n in enumerate(names)
            }

        settle(bench, merged, [lam], self.steps, self.learning_rate, unit=True)
        return merged()

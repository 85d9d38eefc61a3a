"""Concrete task arithmetic: a learned mask on the sum of task vectors (Tang et al., 2023, arXiv:2312.06173)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.adaptive import Adaptive, Bench, settle
from polytask.merging.base import Place, in_range
from polytask.registry import register


@register(
    "concrete",
    family="merging",
    paper="arXiv:2312.06173",
    needs="inputs",
    aliases=("concrete_task_arithmetic", "concrete_subspace"),
)
class Concrete(Adaptive):
    r"""Learn which entries of the sum of task vectors to keep, so that the merged model is sure of its answers on unlabelled inputs.

    .. math:: W = W_0 + \lambda\, \frac{m}{\bar m} \odot \sum_t \tau_t, \qquad
        m = \sigma\Bigl(\frac{x + \log u - \log(1 - u)}{T}\Bigr),\ u \sim U(0, 1), \qquad
        \min_x\ \mathbb E_u \sum_t \mathbb E\, H\bigl(p_W(\cdot)\bigr)

    with one mask for all experts and :math:`\bar m` its mean over each tensor. A mask is drawn anew in every step, and once more for the
    result: which entries are kept is learned as far as x went, and left to chance beyond. The paper's Concrete AdaMerging, which learns
    :math:`\lambda` within each of these steps, is not here.

    Args:
        scale: :math:`\lambda`, chosen on validation data as in task arithmetic.
        temperature: T; towards 0 masks become zeros and ones.
        logits: x at first.
        mask: how the result's is drawn: ``continuous`` as in learning, ``discrete`` as zeros and ones.
        steps: of Adam, each on one batch of every task.
        learning_rate: of Adam; x goes as far as it times the steps.
        labels: take batches of inputs and labels and descend their cross-entropy, which the paper does not.

    Cost: a forward and a backward pass a step and task; memory for four more models.
    """

    def __init__(
        self,
        *,
        scale: float = 0.3,
        temperature: float = 0.5,
        logits: float = 0.0,
        mask: Literal["continuous", "discrete"] = "continuous",
        steps: int = 2000,
        learning_rate: float = 1e-3,
        labels: bool = False,
    ) -> None:
        in_range(scale, "the scale", float("-inf"), float("inf"))
        in_range(temperature, "the temperature of concrete", 0, float("inf"), open_low=True)
        in_range(logits, "the logits of concrete", float("-inf"), float("inf"))
        in_range(steps, "the number of steps of concrete", 0, float("inf"))
        in_range(learning_rate, "the learning rate of concrete", 0, float("inf"), open_low=True)
        if mask not in ("continuous", "discrete"):
            raise InputError(f"the mask of concrete is 'continuous' or 'discrete', not {mask!r}")
        self.scale, self.temperature, self.logits, self.mask = scale, temperature, logits, mask
        self.steps, self.learning_rate, self.takes_labels = steps, learning_rate, labels

    def fit(self, bench: Bench) -> dict[str, Tensor]:
        total = {n: self.scale * D.sum(0) for n, D in bench.D.items()}
        x = {n: torch.full_like(W, self.logits, requires_grad=True) for n, W in bench.W0.items()}
        draws = {n: Place(n, bench.seed).generator() for n in x}

        def merged(discrete: bool = False) -> dict[str, Tensor]:
            found = {}
            for n, W0 in bench.W0.items():
                m = drawn(x[n], draws[n], 0.0 if discrete else self.temperature)
                found[n] = W0 + total[n] * m / m.mean().clamp_min(torch.finfo(m.dtype).tiny)
            return found

        settle(bench, merged, list(x.values()), self.steps, self.learning_rate)
        return merged(self.mask == "discrete")


def drawn(x: Float[Tensor, "..."], generator: torch.Generator, temperature: float) -> Float[Tensor, "..."]:
    """A mask of the binary Concrete distribution with logits x; at temperature 0 a Bernoulli one, without gradient."""
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    noisy = x + u.logit(eps=torch.finfo(x.dtype).eps)
    return (noisy / temperature).sigmoid() if temperature else (noisy > 0).to(x.dtype)

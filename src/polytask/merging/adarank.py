"""AdaRank (Lee et al., 2025, arXiv:2503.22178)."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.merging.adaptive import Adaptive, Bench, settle
from polytask.merging.base import in_range
from polytask.merging.spectral import leading_triplets
from polytask.registry import register


@register("adarank", family="adaptive", paper="arXiv:2503.22178", needs="inputs", aliases=("AdaRank",))
class AdaRank(Adaptive):
    r"""Learn which singular directions of each task vector to keep, so that the merged model is sure of its answers on unlabelled inputs.

    .. math:: W = W_0 + \lambda \sum_t U_t \operatorname{diag}(b_t \odot \sigma_t)\, V_t^\top, \qquad
        b_t = [\,a_t > 0\,], \qquad \min_a\ \sum_t \mathbb E_x\, H\bigl(p_W(\cdot \mid x)\bigr)

    with the sigmoid's gradient in place of the step's (straight through). At first the leading directions are on. Tensors that are not
    matrices get the mean task vector. [inferred] The authors' slope, step and share at the start were not at hand.

    Args:
        scale: :math:`\lambda`.
        rank: share of the directions that are on at first.
        centred: start from the mean of the experts and keep directions of their departures, as CART does, the paper's better variant.
        steps: of Adam, each on one batch of every task.
        learning_rate: of Adam on a; its entries start at +1 and -1.

    Cost: T eigendecompositions a matrix at first; a forward and a backward pass a step and task.
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        rank: float = 0.16,
        centred: bool = True,
        steps: int = 200,
        learning_rate: float = 0.05,
    ) -> None:
        in_range(rank, "the rank of adarank", 0, 1)
        in_range(learning_rate, "the learning rate of adarank", 0, float("inf"), open_low=True)
        self.scale, self.rank, self.centred = scale, rank, centred
        self.steps, self.learning_rate = steps, learning_rate

    def fit(self, bench: Bench) -> dict[str, Tensor]:
        fixed: dict[str, Tensor] = {}
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        gates: dict[str, list[Tensor]] = {}
        for n, D in bench.D.items():
            mean = D.mean(0)
            if D.ndim != 3:
                fixed[n] = bench.W0[n] + mean
                continue
            fixed[n] = bench.W0[n] + mean if self.centred else bench.W0[n]
            parts[n] = [leading_triplets(d - mean if self.centred else d, min(d.shape)) for d in D]
            on = max(1, round(self.rank * min(D.shape[1:]))) if self.rank else 0
            gates[n] = [torch.where(torch.arange(len(s)) < on, 1.0, -1.0).requires_grad_() for _, s, _ in parts[n]]

        def merged() -> dict[str, Tensor]:
            W = dict(fixed)
            for n, triplets in parts.items():
                for (U, s, Vh), a in zip(triplets, gates[n], strict=True):
                    soft = a.sigmoid()
                    b = (a > 0).to(soft.dtype) + soft - soft.detach()
                    W[n] = W[n] + self.scale * (U * (b.to(s.dtype) * s)) @ Vh
            return W

        learned = [a for each in gates.values() for a in each if len(a)]
        settle(bench, merged, learned, self.steps, self.learning_rate)
        return merged()

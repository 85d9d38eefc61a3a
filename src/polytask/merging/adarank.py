"""AdaRank (Lee et al., ICLR 2026, arXiv:2503.22178)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polytask.merging.adaptive import Adaptive, Bench, settle
from polytask.merging.base import in_range
from polytask.merging.spectral import leading_triplets
from polytask.registry import register

OFF = 0.1
"""How far below zero a direction's entry starts that is off, and above it one that is on."""


@register("adarank", family="merging", paper="arXiv:2503.22178", needs="inputs", aliases=("AdaRank",))
class AdaRank(Adaptive):
    r"""Learn which singular directions of each task vector to keep, and how much of each task vector to add, on unlabelled inputs.

    .. math:: W^l = M^l + \sum_t \lambda_t^l\, U_t \operatorname{diag}(b_t \odot \sigma_t)\, V_t^\top, \qquad
        b_t = [\,a_t > 0\,], \qquad \min_{a, \lambda}\ \sum_t \mathbb E_x\, H\bigl(p_W(\cdot \mid x)\bigr)

    with a gradient in place of the step's (straight through). M is the mean of the experts, and U, sigma, V are of their departures from
    it, as in CART; or M is the base and they are of the task vectors. At first the leading directions are on. Tensors that are not
    matrices are learned by their coefficients alone.

    Args:
        scale: :math:`\lambda` at first; the authors take 1.6 to 3.0 for departures from the mean, chosen for each set of experts, and 0.3
            for task vectors.
        rank: share of the directions that are on at first; the authors' lie between 0.04 and 0.32, and at 1 for task vectors.
        centred: start from the mean of the experts, the paper's better variant.
        steps: of Adam, each on one batch of every task; 10,000 in the paper's experiments.
        learning_rate: of Adam, on a, whose entries start at 0.1 and -0.1, and on :math:`\lambda`.
        labels: take batches of inputs and labels and descend their cross-entropy, which the paper does not.

    Cost: T eigendecompositions a matrix at first; a forward and a backward pass a step and task.
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        rank: float = 0.16,
        centred: bool = True,
        steps: int = 500,
        learning_rate: float = 1e-3,
        labels: bool = False,
    ) -> None:
        in_range(rank, "the rank of adarank", 0, 1)
        in_range(learning_rate, "the learning rate of adarank", 0, float("inf"), open_low=True)
        in_range(steps, "the number of steps of adarank", 0, float("inf"))
        self.scale, self.rank, self.centred = scale, rank, centred
        self.steps, self.learning_rate, self.takes_labels = steps, learning_rate, labels

    def fit(self, bench: Bench) -> dict[str, Tensor]:
        T, names = len(bench.batches), list(bench.W0)
        M, R = {}, {}
        for n, D in bench.D.items():
            mean = D.mean(0) if self.centred else torch.zeros_like(D[0])
            M[n], R[n] = bench.W0[n] + mean, D - mean
        parts = {n: _Directions.of(D, self.rank) for n, D in R.items() if D.ndim == 3}
        lam = torch.full((len(names), T), float(self.scale), requires_grad=True)

        def merged() -> dict[str, Tensor]:
            return {
                n: M[n] + (parts[n].added(row) if n in parts else torch.tensordot(row.to(R[n].dtype), R[n], dims=1))
                for n, row in zip(names, lam, strict=True)
            }

        learned = [lam, *(p.a for p in parts.values() if len(p.a))]
        settle(bench, merged, learned, self.steps, self.learning_rate)
        return merged()


@dataclass(frozen=True)
class _Directions:
    """The singular directions of all experts' task vectors of one tensor, side by side, and which of them are on."""

    U: Float[Tensor, "m r"]
    s: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    expert: Int[Tensor, " r"]
    a: Float[Tensor, " r"]

    @classmethod
    def of(cls, D: Float[Tensor, "experts m n"], rank: float) -> _Directions:
        full = min(D.shape[1:])
        on = max(1, round(rank * full)) if rank else 0
        triplets = [leading_triplets(d, full) for d in D]
        U, s, Vh = (torch.cat(part, dim) for part, dim in zip(zip(*triplets, strict=True), (1, 0, 0), strict=True))
        count = torch.tensor([len(own) for _, own, _ in triplets])
        place = torch.cat([torch.arange(int(c)) for c in count])
        a = torch.where(place < on, OFF, -OFF).requires_grad_()
        return cls(U, s, Vh, torch.arange(len(D)).repeat_interleave(count), a)

    def added(self, lam: Float[Tensor, " experts"]) -> Float[Tensor, "m n"]:
        b = (self.a > 0).to(self.a.dtype) + self.a - self.a.detach()
        return (self.U * ((lam[self.expert] * b).to(self.s.dtype) * self.s)) @ self.Vh

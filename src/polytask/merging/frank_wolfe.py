"""Frank-Wolfe merging (Chen et al., ICCV 2025, arXiv:2503.12649)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.adaptive import Adaptive, Bench
from polytask.merging.base import in_range
from polytask.registry import register


@register(
    "frank_wolfe", family="merging", paper="arXiv:2503.12649", needs="inputs", aliases=("fw_merging", "FW-Merging")
)
class FrankWolfe(Adaptive):
    r"""Walk from task arithmetic towards one expert at a time, always the one that the loss falls towards fastest.

    .. math:: W \leftarrow W_0 + \lambda \sum_t \tau_t, \qquad v = \arg\min_k\ \langle \nabla \ell(W),\, W_k \rangle, \qquad
        W \leftarrow (1 - \gamma_i)\, W + \gamma_i W_v, \qquad \gamma_i = \eta\, \tfrac{2}{i + 2}

    over the experts and the start: W never leaves their convex hull, and experts that help nobody are never walked to, which is what the
    method is for where there are many. :math:`\ell` is the sum of the tasks' cross-entropies on labelled batches, as in the paper, or of
    the entropies of their predictions.

    Args:
        wise: choose among the experts for the whole ``model``, or for each ``layer`` (tensor) apart.
        labels: take batches of inputs and labels.
        start: :math:`\lambda`; 0 starts at the base.
        stride: :math:`\eta`, small as in the authors' code: the walk mends task arithmetic, it does not replace it. With 1, the first
            step goes two thirds of the way to an expert.
        steps: of the walk, i = 1, 2, ...

    Cost: a forward and a backward pass a step and batch of a task; every step looks at all batches.
    """

    def __init__(
        self,
        *,
        wise: Literal["model", "layer"] = "model",
        labels: bool = False,
        start: float = 0.3,
        stride: float = 0.03,
        steps: int = 10,
    ) -> None:
        if wise not in ("model", "layer"):
            raise InputError(f"frank_wolfe chooses 'model'- or 'layer'-wise, not {wise!r}")
        in_range(start, "the start of frank_wolfe", 0, 1)
        in_range(stride, "the stride of frank_wolfe", 0, 1)
        in_range(steps, "the number of steps of frank_wolfe", 0, float("inf"))
        self.wise, self.takes_labels = wise, labels
        self.start, self.stride, self.steps = start, stride, steps

    def fit(self, bench: Bench) -> dict[str, Tensor]:
        first = {n: bench.W0[n] + self.start * D.sum(0) for n, D in bench.D.items()}
        W = {n: v.clone() for n, v in first.items()}
        for i in range(1, self.steps + 1):
            towards = self._slopes(bench, W, first)
            if self.wise == "model":
                towards = towards.sum(0).expand_as(towards)
            for row, (n, w) in zip(towards, W.items(), strict=True):
                k = int(row.argmin())
                w.lerp_(bench.W0[n] + bench.D[n][k] if row[k] < 0 else first[n], self.stride * 2 / (i + 2))
        return W

    def _slopes(self, bench: Bench, W: dict[str, Tensor], first: dict[str, Tensor]) -> Float[Tensor, "tensors experts"]:
        """<gradient, expert - start>: what decides between experts, and against 0 between them and the start."""
        rows = []
        for n, g in self._gradient(bench, W).items():
            beyond = bench.D[n] - (first[n] - bench.W0[n])
            rows.append((beyond * g).flatten(1).sum(1) if g.ndim else beyond * g)
        return torch.stack(rows).double()

    def _gradient(self, bench: Bench, W: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: w.detach().clone().requires_grad_() for n, w in W.items()}
        for t, batches in bench.batches.items():
            for batch in batches:
                loss = bench.loss(leaves, t, batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
        return {n: torch.zeros_like(W[n]) if v.grad is None else v.grad for n, v in leaves.items()}

"""Frank-Wolfe merging (Chen et al., ICCV 2025, arXiv:2503.12649)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging.adaptive import Adaptive, Bench, entropy
from polytask.registry import register


@register(
    "frank_wolfe", family="adaptive", paper="arXiv:2503.12649", needs="inputs", aliases=("fw_merging", "FW-Merging")
)
class FrankWolfe(Adaptive):
    r"""Walk from the base towards one expert at a time, always the one that the loss falls towards fastest.

    .. math:: v = \arg\min_{k}\ \langle \nabla \ell(W),\, W_k \rangle, \qquad W \leftarrow (1 - \gamma) W + \gamma\, W_v, \qquad
        \gamma = \tfrac{2}{i + 2}

    over the base and the experts: W never leaves their convex hull, and experts that help nobody are never walked to, which is what the
    method is for where there are many. :math:`\ell` is the sum of the tasks' cross-entropies on labelled batches, or of the entropies of
    their predictions.

    Args:
        wise: choose among the experts for the whole ``model``, or for each ``layer`` (tensor) apart.
        labels: take batches of inputs and labels.
        steps: of the walk; the first one, with :math:`\gamma = 1`, is left out, so that it starts at the base.

    Cost: a forward and a backward pass a step and task.
    """

    def __init__(self, *, wise: Literal["model", "layer"] = "layer", labels: bool = False, steps: int = 50) -> None:
        if wise not in ("model", "layer"):
            raise InputError(f"frank_wolfe chooses 'model'- or 'layer'-wise, not {wise!r}")
        self.wise, self.takes_labels, self.steps = wise, labels, steps

    def fit(self, bench: Bench) -> dict[str, Tensor]:
        W = {n: v.clone() for n, v in bench.W0.items()}
        for i in range(1, self.steps + 1):
            gradient = self._gradient(bench, W)
            # <g, W_k> of the base is the offset of all: only <g, tau_k> differs, and is 0 for the base
            towards = torch.stack(
                [(bench.D[n] * g).flatten(1).sum(1) if g.ndim else bench.D[n] * g for n, g in gradient.items()]
            ).double()
            if self.wise == "model":
                towards = towards.sum(0).expand_as(towards)
            for row, (n, w) in zip(towards, W.items(), strict=True):
                k = int(row.argmin())
                vertex = bench.W0[n] + bench.D[n][k] if row[k] < 0 else bench.W0[n]
                w.lerp_(vertex, 2 / (i + 2))
        return W

    def _gradient(self, bench: Bench, W: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: w.detach().clone().requires_grad_() for n, w in W.items()}
        total = torch.zeros(())
        for t in bench.batches:
            batch = bench.next_batch(t)
            if self.takes_labels:
                inputs, labels = batch
                total = total + F.cross_entropy(bench.logits(leaves, t, inputs), labels)
            else:
                total = total + entropy(bench.logits(leaves, t, batch))
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {n: torch.zeros_like(W[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}

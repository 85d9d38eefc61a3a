"""RegMean++ (Nguyen et al., 2025, arXiv:2508.03121)."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.adaptive import Adaptive, Bench
from polytask.merging.base import TURNED, Place
from polytask.merging.regmean import RegMean
from polytask.merging.statistics import gather_gramians
from polytask.registry import register


@register(
    "regmean_pp",
    family="merging",
    paper="arXiv:2508.03121",
    needs="inputs",
    aliases=("regmean_plus_plus",),
)
class RegMeanPlusPlus(Adaptive):
    r"""Make each linear layer agree with every expert's outputs on the inputs that it will get in the merged model.

    .. math:: W^l = \Bigl(\sum_t W_t^l \tilde G_t^l\Bigr)\Bigl(\sum_t \tilde G_t^l\Bigr)^{+}, \qquad
        G_t^l = X_t^{l\top} X_t^l, \quad X_t^l \text{ behind the layers merged already}

    RegMean takes the inputs that each expert's own earlier layers make; in the merged model, the earlier layers are merged too. Layers
    are merged in the order in which they run. Tensors that are not weights of linear layers get the mean of the experts' first.

    Args:
        alpha: what off-diagonal entries are multiplied by, as in RegMean.

    Cost: a forward pass for every layer and task, and an n x n solve for every layer of n inputs.
    """

    learns = False

    def __init__(self, *, alpha: float = 0.9) -> None:
        self.regmean = RegMean(alpha=alpha)
        self.alpha = alpha

    @torch.no_grad()
    def fit(self, bench: Bench) -> dict[str, Tensor]:
        W = {n: bench.W0[n] + D.mean(0) for n, D in bench.D.items()}
        first, batches = next(iter(bench.batches.items()))
        order = [n for n in gather_gramians(bench.with_weights(W, first), batches) if n.removesuffix(TURNED) in W]
        if not order:
            raise InputError("regmean_pp merges linear layers, and none of the model's is among the tensors merged")
        for stored in order:
            n = stored.removesuffix(TURNED)
            G = [gather_gramians(bench.with_weights(W, t), bench.batches[t], only={n})[stored] for t in bench.batches]
            W_t = bench.W0[n] + bench.D[n]
            # a layer may keep its weight as (inputs, outputs)
            merged = self.regmean.combine(W_t if stored == n else W_t.mT, Place(n, statistics=tuple(G)))
            W[n] = merged if stored == n else merged.mT
        return W

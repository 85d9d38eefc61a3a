"""GradNorm (Chen, Badrinarayanan, Lee and Rabinovich, ICML 2018, arXiv:1711.02257)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.inner_adam import InnerAdam
from polytask.errors import InputError
from polytask.registry import register


@register(
    "gradnorm",
    family="balancing",
    paper="arXiv:1711.02257",
    needs="gramian",
    aliases=("gradient_normalization",),
    invariances=("permutation", "scale", "single"),
)
class GradNorm(GramianWeighting):
    r"""Learn weights that give every task a gradient as long as its pace of training calls for.

    .. math:: \min_s \sum_i \Bigl|\, w_i \lVert g_i\rVert - \bar n\, r_i^\alpha \Bigr|, \qquad
        w = K\, \mathrm{softmax}(s), \quad r_i = \frac{L_i / L_i(0)}{\mathrm{mean}_j\, L_j / L_j(0)}

    with :math:`\bar n` the mean of :math:`w_i \lVert g_i\rVert` and the target held constant. :math:`L_i(0)` is the
    first loss seen of each task; s takes one Adam step a step, after its weights were used. A preference multiplies
    the weights.

    Args:
        alpha: restoring force towards equal pace; the paper's 1.5 (0.12 for noisy problems).
        lr: step size of s.

    Cost: a dozen operations on K numbers, beside the gradients' lengths (the paper takes them at the last shared
    layer: give it as ``shared``, or use representation level).
    """

    def __init__(self, *, alpha: float = 1.5, lr: float = 0.025, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.alpha, self.lr = alpha, lr
        self.adam = InnerAdam("logits", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**self.adam.start(n_tasks, 0.0), "first_loss": np.full(n_tasks, np.nan)}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        if losses is None:
            raise InputError("gradnorm compares the losses with their first values: give losses=")
        first = self.state["first_loss"]
        before = first[self.active]
        before = first[self.active] = np.where(np.isnan(before) | (before == 0), losses, before)
        rows = torch.from_numpy(self.active)
        w = len(C) * torch.softmax(self.adam.read(self.state, rows, rows.device).double(), 0).numpy()
        n = np.sqrt(np.diag(C))
        # a loss of 0, or one that changed its sign, has the least ratio that a power can be taken of
        pace = np.divide(losses, before, out=np.ones_like(losses), where=before != 0)
        pace = np.maximum(pace, np.finfo(np.float64).eps)
        target = (w * n).mean() * (pace / pace.mean()) ** self.alpha
        slope = n * np.sign(w * n - target)
        self.adam.step(self.state, rows, torch.from_numpy(w * (slope - (w @ slope) / len(C))))
        return np.asarray(self.p * w)

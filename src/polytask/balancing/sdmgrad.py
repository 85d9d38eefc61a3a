"""SDMGrad: direction-oriented multi-objective learning (Xiao, Ban and Ji, NeurIPS 2023, arXiv:2305.18409)."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import project_simplex, simplex_qp
from polytask.registry import register


@register(
    "sdmgrad",
    family="balancing",
    paper="arXiv:2305.18409",
    needs="gramian",
    invariances=("permutation", "scale", "single"),
)
class SDMGrad(GramianWeighting):
    r"""Take the common descent direction nearest to the mean gradient.

    .. math:: w = \arg\min_{w \in \Delta} \tfrac12 w^\top C w + \lambda\, w^\top C\, 1 / K, \qquad
        d = \frac{\sum_i (w_i + \lambda / K)\, g_i}{1 + \lambda}

    :math:`\lambda = 0` is MGDA, :math:`\lambda \to \infty` the mean. With one batch the problem is solved exactly on its gradients. With
    three, as in the paper, :math:`C` is :math:`G_1 G_2^\top / s^2` of two independent batches,
    :math:`s = \tfrac1K \sum_i \sqrt{\max(0, \langle g_{1i}, g_{2i}\rangle)}`, free of the bias of one batch's Gramian; the weights, kept
    from step to step, take ``steps`` projected gradient steps towards the solution; and d is made of the third batch's gradients. A
    preference scales the gradients before.

    Args:
        lam: :math:`\lambda`, pull towards the mean; 0.3 as in LibMTL.
        batches: 1, or 3 for the stochastic form, run by :func:`polytask.backward_batches`.
        steps: steps of the weights, of the stochastic form.
        lr: their size. LibMTL takes 5, the authors 10, which overshoots: C has eigenvalues up to K.
        momentum: of the steps, begun anew in each call.

    Cost: a few active-set solves of K unknowns a step; with three batches, two times K backward passes and 2 K x P numbers more.
    """

    def __init__(
        self,
        *,
        lam: float = 0.3,
        batches: Literal[1, 3] = 1,
        steps: int = 20,
        lr: float = 0.5,
        momentum: float = 0.5,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if not lam >= 0:
            raise InputError(f"the pull lam of sdmgrad is at least 0, not {lam}")
        if batches not in (1, 3):
            raise InputError(f"sdmgrad takes 1 or 3 batches a step, not {batches!r}")
        if not (steps >= 1 and lr > 0 and 0 <= momentum < 1):
            raise InputError(
                f"sdmgrad needs steps >= 1, lr > 0 and momentum in [0, 1), not {steps}, {lr} and {momentum}"
            )
        self.lam, self.steps, self.lr, self.momentum = lam, steps, lr, momentum
        self.batches = batches
        self.roles = ("train",) if batches == 1 else ("train", "train", "train")

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"weights": np.full(n_tasks, 1 / n_tasks)} if self.batches > 1 else {}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        p, k = self.p, len(C)
        C = C * p * p[:, None]
        w = self._descend(C) if self.batches > 1 else simplex_qp(C, self.lam * C.mean(1), self.precision)
        return np.asarray(p * (w + self.lam / k) / (1 + self.lam))

    def _descend(self, M: Matrix) -> Vector:
        s = np.sqrt(np.maximum(np.diag(M), 0)).mean()
        if s > 0:
            M = M / s**2
        share = self.state["weights"][self.active].sum()
        w: Vector = self.state["weights"][self.active] / share
        velocity = np.zeros_like(w)
        for _ in range(self.steps):
            velocity = self.momentum * velocity + M @ w + self.lam * M.mean(1)
            w = project_simplex(w - self.lr * velocity)
        self.state["weights"][self.active] = share * w
        return w

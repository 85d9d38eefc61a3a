"""FORUM: a first-order multi-gradient method for multi-objective bilevel optimization (Ye, Lin, Cao, Zhang and Tsang, ECAI 2024)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from polytask.autograd import gramian
from polytask.balancing.base import BaseOptions, Matrix, Role, Vector, nearest_combination
from polytask.balancing.inner_adam import InnerAdam
from polytask.balancing.looks import LookingBalancer, Looks
from polytask.balancing.rows import rows_of
from polytask.errors import InputError, TrainingError
from polytask.linalg import SINGLE, simplex_qp
from polytask.registry import register

TINY = 1e-8


def constrained_weights(C: Matrix, b: Vector, n: float, phi: float) -> Vector:
    r"""The weights of objectives under a constraint whose gradient has to go on falling.

    .. math:: \min_{w \in \Delta,\, \nu \ge \max(0, \pi^\top w)} \lVert V^\top w + \nu g \rVert^2 - \nu \varphi n, \qquad
        \pi = \varphi - b / n

    The best :math:`\nu` is always :math:`\max(0, \pi^\top w)`, and what is left is the larger of two parabolas near where they meet, at
    :math:`\pi^\top w = 0`: :math:`\lVert V^\top w \rVert^2` below, and above
    :math:`\lVert V^\top w \rVert^2 - (b^\top w)^2 / n + \varphi b^\top w`.

    Args:
        C: :math:`VV^\top`, shape (tasks, tasks).
        b: :math:`Vg`, shape (tasks,).
        n: :math:`\lVert g \rVert^2`, positive.
        phi: :math:`\varphi`.

    Returns:
        w, shape (tasks,). Cost: one or two problems on the simplex of K unknowns; else some forty.
    """
    pi = phi - b / n

    def mixture(t: float) -> Vector:
        left = C - t * np.outer(b, b) / n
        # where V is parallel to g nothing is left but rounding, of either sign
        np.fill_diagonal(left, np.maximum(np.diag(left), SINGLE * np.diag(C)))
        return simplex_qp(2 * left, t * phi * b)

    below, above = mixture(0.0), mixture(1.0)
    if pi @ below <= 0:
        return below
    if pi @ above >= 0:
        return above
    low, high = 0.0, 1.0
    for _ in range(40):
        t = (low + high) / 2
        w = mixture(t)
        low, high = (t, high) if pi @ w > 0 else (low, t)
    return w


@register(
    "forum",
    family="balancing",
    paper="arXiv:2401.09257",
    needs="several batches",
    invariances=("permutation",),
    exempt={
        "scale": "unit gradients of the validation losses and raw ones of the constraint are added, as in the paper",
    },
)
class FORUM(LookingBalancer):
    r"""Lower all validation losses under the constraint that the weighted training loss is as low as a few steps on it can make it.

    .. math:: f(\alpha, \theta) = \textstyle\sum_i s_i L_i(\theta),\; s = \mathrm{softmax}(\alpha + \log p), \qquad
        q = f(\alpha, \theta) - f(\alpha, \theta_T), \qquad
        d = \sum_k \lambda_k v_k + \nu \nabla q, \quad \nu = \max\bigl(0, \textstyle\sum_k \lambda_k \pi_k\bigr)

    in the coordinates :math:`(\alpha, \theta)`, with :math:`\theta_T` after T steps of gradient descent on f from :math:`\theta`, held
    fixed in :math:`\nabla q`; unit gradients
    :math:`v_k = p_k (0, \nabla L_k^{val} / \lVert \nabla L_k^{val} \rVert)`;
    :math:`\pi_k = \varphi - \langle v_k, \nabla q \rangle / \lVert \nabla q \rVert^2`; and :math:`\lambda` a moving average, of pace
    :math:`t^{-3/4}` in step t, of the solutions of :func:`constrained_weights`. :math:`\alpha` takes an Adam step against its part
    of d; the rest is the direction of all parameters, those of single tasks included. LibMTL's form, but for its pace,
    which there falls by epochs.

    Args:
        phi: :math:`\varphi`, how fast the constraint is to be met.
        steps: T, steps of the look-ahead; it ends before the losses stop being finite.
        inner_lr: their size.
        lr: step size of :math:`\alpha`.

    Cost: 2 T + 1 forward and T + K backward passes, K x P numbers.
    """

    roles: tuple[Role, ...] = ("train", "validation")
    weighs_heads = True

    def __init__(
        self,
        *,
        phi: float = 0.1,
        steps: int = 5,
        inner_lr: float = 0.1,
        lr: float = 1e-3,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if not (phi > 0 and steps >= 1 and inner_lr > 0 and lr > 0):
            raise InputError(
                f"forum needs phi, inner_lr and lr above 0 and steps of at least 1, not {phi}, {inner_lr}, {lr} and {steps}"
            )
        self.phi, self.steps, self.inner_lr, self.lr = phi, steps, inner_lr, lr
        self.adam = InnerAdam("alpha", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**self.adam.start(n_tasks, 0.0), "weights": np.full(n_tasks, 1 / n_tasks), "steps": 0}

    def ahead(self, looks: Looks, s: Tensor, g: Tensor) -> Tensor:
        r"""The training losses at :math:`\theta_T`, shape (tasks,), given the gradient g of f at :math:`\theta`."""
        L, step = looks.values, torch.zeros_like(g)
        for t in range(self.steps):
            step = step - self.inner_lr * g
            try:
                with looks.moved(step):
                    there = torch.stack(list(looks.losses_without_graph(0).values()))
                    if t + 1 < self.steps:
                        g = looks.slope(0, s)
            except TrainingError:  # too long steps: what they led to before is what is left to compare with
                break
            L = there
        return L

    def look(self, looks: Looks) -> tuple[Tensor, Tensor | None]:
        p = torch.as_tensor(self.p).to(looks.values)
        rows = rows_of(self.active, len(self.state["weights"]), p.device)
        s = torch.softmax(self.adam.read(self.state, rows, p.device).to(p) + p.log(), 0)
        g = looks.slope(0, s)
        D = looks.values - self.ahead(looks, s, g)
        g_alpha = s * D - s * (s @ D)
        V = looks.rows(1)
        size = V.norm(dim=1)
        V = V * (p / torch.where(size > 0, size, 1.0))[:, None]
        b, n = (V @ g).double().cpu().numpy(), float(g_alpha @ g_alpha + g @ g) + TINY
        kept = np.flatnonzero(size.cpu().numpy() > 0)
        weights = self.state["weights"][self.active]
        if len(kept):
            C = gramian(V).cpu().numpy()[np.ix_(kept, kept)]
            found = constrained_weights(C, b[kept], n, self.phi)
            self.state["steps"] += 1
            pace = self.state["steps"] ** -0.75
            weights[kept] += pace * (weights[kept].sum() * found - weights[kept])
            self.state["weights"][self.active] = weights
        weights = weights / weights.sum()
        nu = max(0.0, float(weights @ (self.phi - b / n)))
        self.adam.step(self.state, rows, nu * g_alpha)
        d = torch.from_numpy(weights).to(V) @ V + nu * g
        if self.every == 1:
            return d, None
        return d, torch.from_numpy(nearest_combination(looks.rows(0), d)).to(d)

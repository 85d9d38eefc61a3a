"""MOML: multi-objective meta learning (Ye, Lin, Yue, Guo, Xiao and Zhang, NeurIPS 2021; Artificial Intelligence 2024)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from polytask.autograd import gramian
from polytask.balancing.base import BaseOptions, Role, precision_of
from polytask.balancing.inner_adam import InnerAdam
from polytask.balancing.looks import LookingBalancer, Looks
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.linalg import min_norm_point
from polytask.registry import register


@register(
    "moml",
    family="balancing",
    paper="arXiv:2102.07121",
    needs="several batches",
    aliases=("multi_objective_meta_learning",),
    invariances=("permutation", "scale", "single"),
)
class MOML(LookingBalancer):
    r"""Learn the weights so that a training step lowers the validation loss of every task.

    .. math:: s = \mathrm{softmax}(\alpha + \log p), \qquad \theta' = \theta - \eta\, G^\top s, \qquad
        a_k = -\eta\, \nabla L_k^{val}(\theta')^\top G^\top J_s, \qquad J_s = \mathrm{diag}(s) - s s^\top

    with G the gradients on the training batch; :math:`a_k` is the slope of the validation loss of task k in :math:`\alpha`.
    :math:`\alpha` takes an Adam step against the shortest vector in the convex hull of the :math:`a_k / \lVert a_k \rVert` (MGDA), then the
    parameters one against :math:`G^\top s`, those of single tasks included: the first-order form of LibMTL, with one inner step; LibMTL
    makes the last step on yet another batch.

    Args:
        inner_lr: :math:`\eta`, length of the look-ahead.
        lr: step size of :math:`\alpha`.

    Cost: two forward and 2 K backward passes, 2 K x P numbers.
    """

    roles: tuple[Role, ...] = ("train", "validation")
    weighs_heads = True

    def __init__(self, *, inner_lr: float = 0.1, lr: float = 1e-3, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not (inner_lr > 0 and lr > 0):
            raise InputError(f"moml needs inner_lr and lr above 0, not {inner_lr} and {lr}")
        self.inner_lr, self.lr = inner_lr, lr
        self.adam = InnerAdam("alpha", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return self.adam.start(n_tasks, 0.0)

    def slopes(self, looks: Looks, G: Tensor, s: Tensor) -> Tensor:
        r"""The rows :math:`a_k`, shape (validation tasks, tasks)."""
        with looks.moved(-self.inner_lr * (s @ G)):
            V = looks.rows(1)
        slope = -self.inner_lr * (V @ G.T)
        return slope * s - (slope @ s)[:, None] * s

    def look(self, looks: Looks) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["alpha"]), looks.values.device)
        log_p = torch.as_tensor(self.p).to(looks.values).log()
        G = looks.rows(0)
        alpha = self.adam.read(self.state, rows, looks.values.device).to(G)
        A = self.slopes(looks, G, torch.softmax(alpha + log_p, 0))
        size = A.norm(dim=1, keepdim=True)
        A = A[size[:, 0] > 0] / size[size[:, 0] > 0]
        if len(A):
            precision = precision_of(G)
            h = torch.from_numpy(min_norm_point(gramian(A).cpu().numpy(), precision)).to(A) @ A
            # Adam makes a full step of the rounding that is left where some alpha suits all tasks
            self.adam.step(self.state, rows, h if bool(h @ h > precision) else torch.zeros_like(h))
        s = torch.softmax(self.adam.read(self.state, rows, looks.values.device).to(G) + log_p, 0)
        return s @ G, s

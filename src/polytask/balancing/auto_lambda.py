"""Auto-Lambda: disentangling dynamic task relationships (Liu, James, Davison and Johns, TMLR 2022, arXiv:2202.03091)."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from polytask.balancing.base import BaseOptions, Role
from polytask.balancing.inner_adam import InnerAdam
from polytask.balancing.looks import LookingBalancer, Looks
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.registry import register


@register(
    "auto_lambda",
    family="balancing",
    paper="arXiv:2202.03091",
    needs="several batches",
    aliases=("AutoLambda", "autol"),
    invariances=("permutation", "scale"),
)
class AutoLambda(LookingBalancer):
    r"""Learn the weights by what a training step does to the losses of a validation batch.

    .. math:: \theta' &= \theta - \alpha \nabla \textstyle\sum_i \lambda_i L_i(\theta), \qquad v = \nabla \sum_i p_i L_i^{val}(\theta') \\
        \frac{\partial}{\partial \lambda_i} \sum_j p_j L_j^{val}(\theta') &= -\alpha \langle \nabla L_i(\theta), v \rangle
            \approx -\alpha\, \frac{L_i(\theta + \epsilon v) - L_i(\theta - \epsilon v)}{2 \epsilon}, \qquad
            \epsilon = \frac{0.01}{\lVert v \rVert}

    :math:`\lambda` takes an Adam step against that, then the parameters that of :math:`\nabla \sum_i \lambda_i L_i` on the training batch,
    those of single tasks included. A preference makes tasks primary: it scales their validation losses and their first weights.
    Weights that Adam would take below zero are held there, and its gradients are measured by the length of the first one, so that its
    :math:`\epsilon` does not see the scale of losses (both ours).

    Args:
        inner_lr: :math:`\alpha`, length of the look-ahead: the optimizer's learning rate.
        lr: step size of :math:`\lambda`.
        start: its first value; 0.1 as in the authors' code.

    Cost: five forward and three backward passes (the training batch four times, twice without graph), whatever the number of tasks.
    """

    roles: tuple[Role, ...] = ("train", "validation")
    weighs_heads = True

    def __init__(
        self, *, inner_lr: float = 1e-3, lr: float = 1e-3, start: float = 0.1, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if not (inner_lr > 0 and lr > 0 and start > 0):
            raise InputError(f"auto_lambda needs inner_lr, lr and start above 0, not {inner_lr}, {lr} and {start}")
        self.inner_lr, self.lr, self.start = inner_lr, lr, start
        self.adam = InnerAdam("weights", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**self.adam.start(n_tasks, self.start), "unit": math.nan}

    def hypergradient(self, looks: Looks, w: Tensor) -> Tensor:
        """The derivatives of the validation losses after the look-ahead with respect to the weights w, shape (tasks,)."""
        with looks.moved(-self.inner_lr * looks.slope(0, w)):
            v = looks.slope(1, torch.as_tensor(self.p).to(w))
        size = v.norm()
        if not bool(size > 0):
            return torch.zeros_like(w)
        found = []
        for sign in (1.0, -1.0):
            with looks.moved(sign * 0.01 / size * v):
                found.append(torch.stack(list(looks.losses_without_graph(0).values())))
        h: Tensor = -self.inner_lr * (found[0] - found[1]) * (size / 0.02)
        return h

    def look(self, looks: Looks) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["weights"]), looks.values.device)
        p = torch.as_tensor(self.p).to(looks.values)
        read = self.adam.read(self.state, rows, looks.values.device).to(looks.values)
        h = p * self.hypergradient(looks, p * read.clamp_min(0))
        if math.isnan(self.state["unit"]) and bool(h.any()):
            self.state["unit"] = float(h.norm())
        if not math.isnan(self.state["unit"]):
            self.adam.step(self.state, rows, h / self.state["unit"])
        w = p * self.adam.read(self.state, rows, looks.values.device).to(looks.values).clamp_min(0)
        return looks.slope(0, w), w

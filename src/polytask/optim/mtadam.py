"""MTAdam: automatic balancing of multiple training loss terms (Malkiel and Wolf 2020, arXiv:2006.14683)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.optim.per_task import PerTaskOptimizer
from polytask.registry import register


@register(
    "mtadam",
    family="optim",
    paper="arXiv:2006.14683",
    needs="jacobian",
    aliases=("MTAdam",),
)
class MTAdam(PerTaskOptimizer):
    r"""Give all tasks gradients of the first task's length, tensor by tensor, and one Adam state each with a common denominator.

    At a parameter tensor, with gradients :math:`g_i` and weights :math:`p_i`,

    .. math:: n_i \leftarrow \beta_3 n_i + (1-\beta_3) \lVert g_i \rVert, \qquad \tilde g_i = p_i \frac{n_1}{n_i}\, g_i

    .. math:: m_i \leftarrow \beta_1 m_i + (1-\beta_1) \tilde g_i, \quad v_i \leftarrow \beta_2 v_i + (1-\beta_2) \tilde g_i^2, \qquad
        \theta \leftarrow \theta - \eta\, \frac{\sum_i \hat m_i}{\max_j \sqrt{\hat v_j} + \epsilon}

    :math:`n_i` begins at the first length. Where the first task does not reach a tensor the next one that does takes its place, so that
    heads are trained by Adam. A loss may be multiplied by any constant without effect. ::

        optimizer = MTAdam(model.parameters(), lr=1e-3)
        ...
        optimizer.zero_grad()
        optimizer.backward(losses)      # or weights={"a": 2.0, "b": 1.0}, or a balancer that needs losses only
        optimizer.step()

    Args:
        params: parameters or groups of them.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2, \beta_3`.
        eps: :math:`\epsilon`.
        weight_decay: decoupled. (The published program adds it to the gradient of every task.)

    Raises:
        InputError: an option outside its range.

    Cost: K backward passes; 2 K numbers a shared parameter. For one task it is AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 3 or not all(0 <= b < 1 for b in betas):
            raise InputError(f"mtadam takes as betas three numbers in [0, 1), not {betas!r}")
        if not 0 <= eps < math.inf:
            raise InputError(f"mtadam takes as eps a number of at least 0, not {eps!r}")
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

    def update(
        self, p: Tensor, gradients: Mapping[str, Tensor], weights: Mapping[str, float], group: Mapping[str, Any]
    ) -> None:
        b1, b2, b3 = group["betas"]
        steps = {task: self.count(p, task) for task in gradients}
        for task, g in gradients.items():
            self._lengthen(p, task, g.norm(), b3)
        anchor = self._anchor(p)
        denominators = []
        for task, g in gradients.items():
            n = self.state[p][f"n:{task}"]
            g = g * torch.where(n > 0, weights[task] * anchor / n, 0.0)
            v = self.moment(p, "v", task).mul_(b2).addcmul_(g, g, value=1 - b2)
            self.moment(p, "m", task).lerp_(g, 1 - b1)
            denominators.append(v.sqrt() / (1 - b2 ** steps[task]) ** 0.5)
        denominator = reduce(torch.maximum, denominators).add_(group["eps"])
        for task, t in steps.items():
            p.addcdiv_(self.moment(p, "m", task).to(p), denominator.to(p), value=-group["lr"] / (1 - b1**t))

    def _lengthen(self, p: Tensor, task: str, length: Tensor, b3: float) -> None:
        """Take the length of a task's gradient into its running mean."""
        key = f"n:{task}"
        state = self.state[p]
        state[key] = state[key].lerp(length, 1 - b3) if key in state else length

    def _anchor(self, p: Tensor) -> Tensor:
        """The mean length of the first task that ever had a gradient here."""
        n = torch.stack([self.state[p][f"n:{task}"] for task in self.tasks if f"n:{task}" in self.state[p]])
        return n[(n > 0).int().argmax()]

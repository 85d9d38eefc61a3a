"""AdaTask: a task-aware adaptive learning rate (Yang et al., AAAI 2023, arXiv:2211.15055)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from polytask.errors import InputError
from polytask.optim.per_task import PerTaskOptimizer
from polytask.registry import register

Rule = Literal["adam", "adagrad", "rmsprop"]


@register(
    "adatask",
    family="optim",
    paper="arXiv:2211.15055",
    needs="jacobian",
    aliases=("AdaTask",),
)
class AdaTask(PerTaskOptimizer):
    r"""Let every task divide its gradient by its own accumulated gradients, so that none rules the step sizes of another.

    With gradients :math:`g_i` at a parameter and weights :math:`p_i`,

    .. math:: \theta \leftarrow \theta - \eta \sum_i p_i\, \frac{\hat m_i}{\sqrt{\hat v_i} + \epsilon}

    with :math:`m_i, v_i` of task i alone: :math:`m_i \leftarrow \beta_1 m_i + (1-\beta_1) g_i` and
    :math:`v_i \leftarrow \beta_2 v_i + (1-\beta_2) g_i^2`, corrected for the start (hats), with ``adam``; :math:`g_i` in place of the first
    moment and no correction with ``rmsprop``; with ``adagrad`` moreover :math:`v_i \leftarrow v_i + g_i^2`. A loss may be multiplied by any
    constant without effect; that is why the weights, if any are given, multiply the tasks' steps rather than their losses. ::

        optimizer = AdaTask(model.parameters(), lr=1e-3)
        ...
        optimizer.zero_grad()
        optimizer.backward(losses)      # or weights={"a": 2.0, "b": 1.0}, or a balancer that needs losses only
        optimizer.step()

    Args:
        params: parameters or groups of them.
        lr: :math:`\eta`.
        rule: ``adam``, ``adagrad`` or ``rmsprop``.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`.
        weight_decay: decoupled.

    Raises:
        InputError: an option outside its range.

    Cost: K backward passes; 2 K numbers a shared parameter, K without a first moment. For one task it is torch's AdamW, Adagrad or RMSprop.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        rule: Rule = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, allowed, valid in (
            ("rule", rule, "'adam', 'adagrad' or 'rmsprop'", rule in ("adam", "adagrad", "rmsprop")),
            ("betas", betas, "two numbers in [0, 1)", len(betas) == 2 and all(0 <= b < 1 for b in betas)),
            ("eps", eps, "a number of at least 0", 0 <= eps < math.inf),
        ):
            if not valid:
                raise InputError(f"adatask takes as {name} {allowed}, not {value!r}")
        self.rule = rule
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

    def update(
        self, p: Tensor, gradients: Mapping[str, Tensor], weights: Mapping[str, float], group: Mapping[str, Any]
    ) -> None:
        b1, b2 = group["betas"]
        for task, g in gradients.items():
            t = self.count(p, task)
            kept, new = (1.0, 1.0) if self.rule == "adagrad" else (b2, 1 - b2)
            v = self.moment(p, "v", task).mul_(kept).addcmul_(g, g, value=new)
            lr, m, denominator = weights[task] * group["lr"], g, v.sqrt()
            if self.rule == "adam":
                m = self.moment(p, "m", task).lerp_(g, 1 - b1)
                lr, denominator = lr / (1 - b1**t), denominator / (1 - b2**t) ** 0.5
            p.addcdiv_(m.to(p), denominator.add_(group["eps"]).to(p), value=-lr)

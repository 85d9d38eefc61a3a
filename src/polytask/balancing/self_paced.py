"""Self-paced weights of MFTCoder (Liu et al., KDD 2024, arXiv:2311.02303)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from polytask.balancing.base import BaseOptions, Role
from polytask.balancing.looks import LookingBalancer, Looks
from polytask.balancing.validation_slopes import record, shares, slopes, softmax, start
from polytask.errors import InputError
from polytask.registry import register


@register(
    "self_paced",
    family="balancing",
    paper="arXiv:2311.02303",
    needs="several batches",
    aliases=("selfpaced", "mftcoder"),
    invariances=("permutation", "scale", "single"),
)
class SelfPaced(LookingBalancer):
    r"""Give most to the tasks whose validation losses fall fastest for their share of the whole.

    .. math:: n_i = K \frac{\alpha_i}{\sum_j |\alpha_j|}, \qquad w = \mathrm{softmax}\bigl(-c\; \mathrm{softmax}(n) \circ n\bigr)

    with :math:`\alpha_i` the slope of the last N validation losses of task i. Equal weights until a task has two of them. Weights sum to
    1 and act on the parameters of single tasks too; a preference multiplies them. The formula is that of MFTCoder's code.

    Args:
        window: N.
        sharpness: c; MFTCoder takes 50, which comes close to one task at a time.

    Cost: one forward pass of a validation batch, without graph.
    """

    roles: tuple[Role, ...] = ("train", "validation")
    weighs_heads = True

    def __init__(self, *, window: int = 100, sharpness: float = 50.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not (window >= 2 and sharpness >= 0):
            raise InputError(f"self_paced needs window >= 2 and sharpness >= 0, not {window} and {sharpness}")
        self.window, self.sharpness = window, sharpness

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {**start(n_tasks, self.window), "steps": 0}

    def look(self, looks: Looks) -> tuple[Tensor, Tensor]:
        self.state["steps"] += 1
        found = looks.losses_without_graph(1)
        at = np.array([i for i, n in zip(self.active, looks.names, strict=True) if n in found], dtype=np.intp)
        if len(at):
            values = torch.stack(list(found.values())).double().cpu().numpy()
            record(self.state, at, values, self.state["steps"])
        n = shares(slopes(self.state, self.active))
        w = softmax(-self.sharpness * softmax(n) * n)
        weights = torch.as_tensor(self.p * w).to(looks.values)
        return looks.slope(0, weights), weights

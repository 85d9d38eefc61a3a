"""MoDo: multi-objective learning with double sampling (Chen, Fernando, Ying and Chen, NeurIPS 2023, arXiv:2305.20057)."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import project_simplex
from polytask.registry import register


@register(
    "modo",
    family="balancing",
    paper="arXiv:2305.20057",
    needs="several batches",
    aliases=("MoDoWeighting", "multi_objective_double_sampling"),
    invariances=("permutation", "scale", "single"),
)
class MoDo(GramianWeighting):
    r"""Move MGDA's weights by small steps whose gradient, from two independent batches, is free of bias.

    .. math:: \lambda \leftarrow \Pi_\Delta\bigl(\lambda - \gamma (G_1 G_2^\top / u + \rho I) \lambda\bigr), \qquad d = G_3^\top \lambda

    with the gradients :math:`G_b` of three batches drawn independently, so that
    :math:`\mathbb E\, G_1 G_2^\top = \mathbb E G\, \mathbb E G^\top`, which no Gramian of one batch is. Starts from equal weights that
    sum to 1. A task absent from one of the batches keeps its weight, and those present share their own sum. A preference scales the
    gradients before. With one batch in place of three the method is MGDA with weights kept warm and moved by a few steps (GS-MGDA, Zhang et
    al., arXiv:2405.19440), biased, and as cheap as MGDA.

    Args:
        gamma: :math:`\gamma`, step size of the weights.
        rho: :math:`\rho`, pull towards equal weights.
        batches: 3, or 1 for all from one.
        steps: of the weights, in each step of the parameters.
        unit: u, the squared length of gradients by which :math:`\gamma` and :math:`\rho` are measured. None takes the mean of the first
            step's and keeps it, which makes the method blind to the scale of all losses together; 1 is the paper's formula.

    Cost: a forward and K backward passes for each of two batches, 2 K x P numbers; one of each for the third. MGDA's cost with one batch.
    """

    def __init__(
        self,
        *,
        gamma: float = 1e-3,
        rho: float = 0.1,
        batches: Literal[1, 3] = 3,
        steps: int = 1,
        unit: float | None = None,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if batches not in (1, 3) or steps < 1:
            raise InputError(
                f"modo takes 1 or 3 batches and at least 1 step of the weights, not {batches!r} and {steps}"
            )
        if not (gamma > 0 and rho >= 0 and (unit is None or unit > 0)):
            raise InputError(f"modo needs gamma > 0, rho >= 0 and unit > 0, not {gamma}, {rho} and {unit}")
        self.gamma, self.rho, self.unit = gamma, rho, unit
        self.batches, self.steps = batches, steps
        self.roles = ("train",) if batches == 1 else ("train", "train", "train")

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"weights": np.full(n_tasks, 1 / n_tasks), "unit": math.nan if self.unit is None else self.unit}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        p = self.p
        if math.isnan(self.state["unit"]):
            self.state["unit"] = self.mean_square
        M = C * p * p[:, None] * (self.mean_square / self.state["unit"])
        share = self.state["weights"][self.active].sum()
        w = self.state["weights"][self.active] / share
        for _ in range(self.steps):
            w = project_simplex(w - self.gamma * (M @ w + self.rho * w))
        self.state["weights"][self.active] = share * w
        return np.asarray(p * w)

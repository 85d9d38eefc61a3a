"""MoCo: multi-objective gradient correction (Fernando et al., ICLR 2023, arXiv:2210.12624)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.balancing.gradient_memory import recall
from polytask.errors import InputError
from polytask.linalg import project_simplex
from polytask.registry import register

TINY = 1e-30


@register(
    "moco",
    family="balancing",
    paper="arXiv:2210.12624",
    needs="jacobian",
    aliases=("multi_objective_gradient_correction",),
    invariances=("permutation", "scale"),
)
class MoCo(GradientAggregator):
    r"""Correct MGDA's bias on batches: follow the gradients by moving averages, and the weights by small steps.

    .. math:: y_i &\leftarrow y_i - \beta_t (y_i - p_i L_i\, g_i / \lVert g_i\rVert) \\
        \lambda &\leftarrow \Pi_\Delta\bigl(\lambda - \gamma_t (Y Y^\top + \rho I) \lambda\bigr), \qquad d = Y^\top \lambda

    with :math:`\beta_t = \beta t^{-1/2}`, :math:`\gamma_t = \gamma t^{-1/2}`. Gradients are scaled to the length of
    their loss, as in the authors' code; the weights are projected on the simplex, as in the paper (LibMTL applies a
    softmax to them again every step, which keeps them near equal). Needs exact level: the averages live in the
    coordinates of the parameters.

    Args:
        beta: memory of the gradients.
        gamma: step size of the weights.
        rho: regularisation of the weights.

    Cost: K x P numbers kept, and a few passes over them a step.
    """

    degree = -0.5
    remembers_gradients = True

    def __init__(self, *, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.beta, self.gamma, self.rho = beta, gamma, rho

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"gradients": None, "weights": np.full(n_tasks, 1 / n_tasks), "steps": 0}

    def aggregate(
        self, J: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None
    ) -> Float[Tensor, " coordinates"]:
        if losses is None:
            raise InputError("moco scales gradients by the losses: give losses=")
        assert self.tasks is not None
        self.state["steps"] += 1
        pace = self.state["steps"] ** -0.5
        memory = recall(self.state, "gradients", len(self.tasks), J)
        size = J.norm(dim=1, keepdim=True).clamp_min(TINY)
        new = torch.as_tensor(self.p).to(J)[:, None] * losses.to(J)[:, None] * (J / size)
        active = torch.as_tensor(self.active, device=J.device)
        Y = memory[active]
        Y = memory[active] = Y - self.beta * pace * (Y - new)
        before = self.state["weights"][self.active]
        C = (Y @ Y.T).double().cpu().numpy()
        step = self.gamma * pace * (C @ before + self.rho * before)
        after = project_simplex(before - step, total=float(before.sum()))
        self.state["weights"][self.active] = after
        direction: Tensor = torch.as_tensor(after).to(J) @ Y
        return direction

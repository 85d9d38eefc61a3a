"""M-ConFIG: conflict-free inverse gradients with momentum (Liu, Chu and Thuerey, ICLR 2025, arXiv:2408.11104)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.balancing.config import ConFIG
from polytask.balancing.gradient_memory import recall
from polytask.errors import InputError
from polytask.registry import register


@register(
    "m_config",
    family="balancing",
    paper="arXiv:2408.11104",
    needs="jacobian",
    aliases=("MConFIG", "momentum_config"),
    invariances=("permutation", "scale"),
    exempt={"single": "each coordinate is divided by its own second moment, as in Adam: the gradient is not kept"},
)
class MConFIG(GradientAggregator):
    r"""Combine momenta instead of gradients, so that a step needs the gradient of one task only.

    .. math:: m_i &\leftarrow \beta_1 m_i + (1 - \beta_1) g_i \quad \text{for the tasks present}, \qquad
        u = \mathrm{ConFIG}(\hat m_1, \dots, \hat m_K) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) \tilde g^2, \qquad d = u / \sqrt{\hat v}

    with hats for bias correction, and :math:`\tilde g` the gradient that would have moved one common momentum to u.
    Give it the losses of one task a step, in turn (or of several). Nothing moves before every task was seen once. It
    brings its own adaptive steps: use it with plain SGD. Needs exact level: the momenta live in the coordinates of the
    parameters.

    Args:
        beta1: memory of the momenta.
        beta2: memory of the second moment.

    Cost: (K + 2) x P numbers kept; one backward pass and a few passes over them a step.
    """

    degree = -0.5
    remembers_gradients = True

    def __init__(self, *, beta1: float = 0.9, beta2: float = 0.999, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise InputError(f"m_config takes beta1 and beta2 in [0, 1), not {beta1} and {beta2}")
        self.beta1, self.beta2 = beta1, beta2

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {
            "momenta": None,
            "seen": torch.zeros(n_tasks, dtype=torch.float32),
            "common": None,
            "square": None,
            "steps": 0,
        }

    def aggregate(
        self,
        J: Float[Tensor, "tasks coordinates"],
        losses: Float[Tensor, " tasks"] | None,  # noqa: ARG002
    ) -> Float[Tensor, " coordinates"]:
        assert self.tasks is not None
        active = torch.as_tensor(self.active, device=J.device)
        m = recall(self.state, "momenta", len(self.tasks), J)
        common, v = (recall(self.state, key, 1, J) for key in ("common", "square"))
        seen = self.state["seen"] = self.state["seen"].to(J.device)
        m[active] = self.beta1 * m[active] + (1 - self.beta1) * J
        seen[active] += 1
        if not bool(seen.all()):
            return torch.zeros_like(J[0])
        self.state["steps"] += 1
        method = ConFIG(preference=self.preference)
        method.bind(self.tasks)
        u = method.direction(m / (1 - self.beta1**seen).to(J.dtype)[:, None])
        after = u * (1 - self.beta1 ** self.state["steps"])
        pseudo = (after - self.beta1 * common[0]) / (1 - self.beta1)
        common[0] = after
        v[0] = self.beta2 * v[0] + (1 - self.beta2) * pseudo**2
        root = (v[0] / (1 - self.beta2 ** self.state["steps"])).sqrt()
        return torch.where(root > 0, u / torch.where(root > 0, root, torch.ones_like(root)), torch.zeros_like(u))

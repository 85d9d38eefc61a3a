"""ExcessMTL: robust multi-task learning with excess risks (He et al., ICML 2024, arXiv:2402.02009)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, GradientAggregator
from polytask.balancing.gradient_memory import recall
from polytask.registry import register


@register(
    "excess_mtl",
    family="balancing",
    paper="arXiv:2402.02009",
    needs="jacobian",
    aliases=("excess_risk",),
    invariances=("permutation", "scale", "single"),
)
class ExcessMTL(GradientAggregator):
    r"""Shift weight to the tasks that are furthest from their own optimum, not to those that are merely noisy.

    .. math:: h_i \leftarrow h_i + g_i^2, \qquad e_i = \sum_c \frac{g_{ic}^2}{\sqrt{h_{ic}}}, \qquad
        w_i \propto w_i\, e^{\eta\, e_i / e_i(0)}

    with weights that sum to K, times the preference; :math:`e_i` estimates the excess risk by a diagonal second-order
    expansion, and is measured by its first value. The first step has equal weights. Needs exact level: h lives in the
    coordinates of the parameters. Task heads keep the gradient of their own loss.

    Args:
        eta: :math:`\eta`, step size of the weights.

    Cost: K x P numbers kept, and a few passes over them a step.
    """

    remembers_gradients = True

    def __init__(self, *, eta: float = 0.01, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.eta = eta

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {
            "root_squares": None,
            "first_excess": torch.full((n_tasks,), torch.nan, dtype=torch.float32),
            "log_weights": torch.zeros(n_tasks, dtype=torch.float32),
        }

    def aggregate(
        self,
        J: Float[Tensor, "tasks coordinates"],
        losses: Float[Tensor, " tasks"] | None,  # noqa: ARG002
    ) -> Float[Tensor, " coordinates"]:
        assert self.tasks is not None
        active = torch.as_tensor(self.active, device=J.device)
        # lengths instead of squares keep half precision and tiny gradients within range
        h = recall(self.state, "root_squares", len(self.tasks), J)
        h[active] = root = torch.hypot(h[active], J)
        share = J.abs() / root.clamp_min(torch.finfo(J.dtype).tiny)
        excess = (J.abs() * share).sum(1).float()
        first, log_w = (self.state[key].to(J.device) for key in ("first_excess", "log_weights"))
        new = torch.isnan(first[active]) & (excess > 0)
        ratio = torch.where(new | (excess == 0), 0.0, excess / first[active])
        first[active] = torch.where(new, excess, first[active])
        log_w[active] += self.eta * ratio
        self.state["first_excess"], self.state["log_weights"] = first, log_w
        w = len(J) * torch.softmax(log_w[active], 0)
        return (w * torch.as_tensor(self.p).to(w)).to(J.dtype) @ J

"""DB-MTL with memory: dual-balancing multi-task learning (Lin et al., 2023, arXiv:2308.12029)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import GradientAggregator, Preference
from polytask.balancing.gradient_memory import recall
from polytask.errors import InputError
from polytask.registry import register


@register(
    "db_mtl_ema",
    family="balancing",
    paper="arXiv:2308.12029",
    needs="jacobian",
    aliases=("dual_balancing_ema",),
    invariances=("permutation", "scale"),
)
class DBMTLEMA(GradientAggregator):
    r"""Take logarithms of the losses, follow their gradients by moving averages, and scale these to the length of the longest.

    .. math:: g_i = \nabla \log L_i, \qquad b_i \leftarrow g_i + \beta_t (b_i - g_i), \quad \beta_t = \beta / t^\sigma, \qquad
        d = \sum_i p_i \frac{\max_j \lVert b_j\rVert}{\lVert b_i\rVert}\, b_i

    from :math:`b_i = 0`, so that the first steps are short; t counts the steps of each task. The paper's whole method:
    :class:`~polytask.balancing.db_mtl.DBMTL` is its :math:`\beta = 0`, without anything to keep. The loss part is ``log_losses=True``,
    the default here. Needs exact level: the averages live in the coordinates of the parameters.

    Args:
        beta: :math:`\beta`, memory of the gradients.
        sigma: :math:`\sigma`, how fast the memory fades with the steps; 0 keeps it.

    Cost: K x P numbers kept, and a few passes over them a step.
    """

    remembers_gradients = True

    def __init__(
        self,
        *,
        beta: float = 0.9,
        sigma: float = 0.0,
        preference: Preference = None,
        log_losses: bool = True,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(preference=preference, log_losses=log_losses, every=every, seed=seed)
        if not (0 <= beta < 1 and sigma >= 0):
            raise InputError(f"db_mtl_ema takes beta in [0, 1) and sigma from 0 on, not {beta} and {sigma}")
        self.beta, self.sigma = beta, sigma

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"averages": None, "steps": torch.zeros(n_tasks, dtype=torch.float32)}

    def aggregate(
        self,
        J: Float[Tensor, "tasks coordinates"],
        losses: Float[Tensor, " tasks"] | None,  # noqa: ARG002
    ) -> Float[Tensor, " coordinates"]:
        assert self.tasks is not None
        active = torch.as_tensor(self.active, device=J.device)
        t = self.state["steps"] = self.state["steps"].to(J.device)
        t[active] += 1
        beta = (self.beta / t[active] ** self.sigma).to(J)[:, None]
        averages = recall(self.state, "averages", len(self.tasks), J)
        averages[active] = b = J + beta * (averages[active] - J)
        n = torch.linalg.vector_norm(b, dim=1, dtype=torch.promote_types(J.dtype, torch.float32))
        w = torch.where(n > 0, n.max() / n.clamp_min(torch.finfo(n.dtype).tiny), torch.zeros_like(n))
        d: Tensor = (w * torch.as_tensor(self.p).to(n)).to(J.dtype) @ b
        return d

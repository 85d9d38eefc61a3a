"""SON-GOKU: graph colouring for multi-task learning (Patapati and Srinivasan, 2025, arXiv:2509.16959)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import gramian
from polytask.balancing.base import BaseOptions, GradientAggregator, Matrix
from polytask.balancing.gradient_memory import recall
from polytask.errors import InputError
from polytask.registry import register


@register(
    "son_goku",
    family="balancing",
    paper="arXiv:2509.16959",
    needs="jacobian",
    aliases=("graph_coloring", "graph_colouring"),
    invariances=("permutation", "scale", "single"),
    example={"refresh": 4},
)
class SonGoku(GradientAggregator):
    r"""Let only tasks that do not interfere with one another move the shared parameters in the same step.

    .. math:: m_i \leftarrow \beta m_i + (1 - \beta) g_i, \qquad i \text{ and } j \text{ interfere where } -\cos(m_i, m_j) > \tau

    Every R steps the graph of interference is coloured by Welsh and Powell's rule: the task with most edges first, of equals the
    one with the longest average. One colour a step then acts in turn, :math:`d = \sum_{i \in \text{colour}} p_i g_i`; all tasks act
    up to the first colouring, and colours without a task in the batch are passed over. Other than the authors' scheduler this sees
    the gradients of all tasks at each step, and task heads keep the gradient of their own loss. Needs exact level: the averages
    live in the coordinates of the parameters.

    Args:
        tau: :math:`\tau`, least interference that separates two tasks, in [0, 1).
        refresh: R, steps between colourings.
        beta: :math:`\beta`, memory of the gradients.

    Cost: K x P numbers kept; a pass over them a step.
    """

    remembers_gradients = True

    def __init__(self, *, tau: float = 0.25, refresh: int = 32, beta: float = 0.9, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not (0 <= tau < 1 and refresh >= 1 and 0 <= beta < 1):
            raise InputError(
                f"son_goku takes tau and beta in [0, 1) and refresh from 1 on, not {tau}, {beta} and {refresh}"
            )
        self.tau, self.refresh, self.beta = tau, refresh, beta

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"averages": None, "colours": np.zeros(n_tasks, dtype=np.int64), "next": 0, "steps": 0}

    def aggregate(
        self,
        J: Float[Tensor, "tasks coordinates"],
        losses: Float[Tensor, " tasks"] | None,  # noqa: ARG002
    ) -> Float[Tensor, " coordinates"]:
        assert self.tasks is not None
        colours = self.state["colours"]
        present, number = colours[self.active], int(colours.max()) + 1
        turn = min(present, key=lambda colour: (colour - self.state["next"]) % number)
        w = torch.as_tensor(self.p * (present == turn)).to(J)
        active = torch.as_tensor(self.active, device=J.device)
        averages = recall(self.state, "averages", len(self.tasks), J)
        averages[active] = self.beta * averages[active] + (1 - self.beta) * J
        self.state["steps"] += 1
        self.state["next"] = (int(turn) + 1) % number
        if self.state["steps"] % self.refresh == 0:
            self.state["colours"], self.state["next"] = _colours(gramian(averages).cpu().numpy(), self.tau), 0
        return w @ J


def _colours(C: Matrix, tau: float) -> npt.NDArray[np.int64]:
    """A colour for each vector, none shared by two whose cosine is below -tau."""
    n = np.sqrt(np.diag(C))
    edges = np.less(C, -tau * np.outer(n, n))
    colours = np.full(len(C), -1, dtype=np.int64)
    for i in np.lexsort((-n, -edges.sum(1))):
        taken = set(colours[edges[i]].tolist())
        colours[i] = next(c for c in range(len(C)) if c not in taken)
    return colours

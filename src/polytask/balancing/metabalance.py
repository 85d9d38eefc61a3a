"""MetaBalance (He et al., WWW 2022, arXiv:2203.06801)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.main_task import check_main, main_position
from polytask.errors import InputError
from polytask.registry import register


@register(
    "metabalance",
    family="balancing",
    paper="arXiv:2203.06801",
    needs="gramian",
    aliases=("meta_balance",),
    invariances=("scale", "single"),
    exempt={
        "permutation": "the main task is named by its position",
        "duplicate": "one copy is the main task and the other an auxiliary one",
    },
)
class MetaBalance(GramianWeighting):
    r"""Scale the gradients of auxiliary tasks towards the length of the main task's.

    .. math:: w_i = p_i \Bigl( r\, \frac{m_0}{m_i} + (1 - r) \Bigr), \qquad
        m_i \leftarrow \beta m_i + (1 - \beta) \lVert g_i\rVert

    with moving averages m of the lengths, started at the first length seen, and 0 the main task. The paper treats each
    tensor apart; here the shared gradient is one. While the main task is absent its last average stands.

    Args:
        main: the main task, by name or position.
        relax: r in [0, 1]: 1 makes all lengths equal to the main task's, 0 changes nothing.
        beta: :math:`\beta`, memory of the averages.

    Cost: K square roots a step.
    """

    def __init__(
        self, *, main: str | int = 0, relax: float = 0.7, beta: float = 0.9, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if not (0 <= relax <= 1 and 0 <= beta < 1):
            raise InputError(f"metabalance takes relax in [0, 1] and beta in [0, 1), not {relax} and {beta}")
        self.main, self.relax, self.beta = main, relax, beta

    def bind(self, tasks: Sequence[str]) -> None:
        check_main(self, self.main, tasks)
        super().bind(tasks)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"lengths": np.full(n_tasks, np.nan)}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        n = np.sqrt(self.mean_square * np.diag(C))
        m = self.state["lengths"]
        old = m[self.active]
        m[self.active] = np.where(np.isnan(old), n, self.beta * old + (1 - self.beta) * n)
        main = m[main_position(self, self.main)]
        if np.isnan(main):  # the main task was never seen: nothing to be measured by
            return self.p
        return np.asarray(self.p * (self.relax * main / m[self.active] + 1 - self.relax))

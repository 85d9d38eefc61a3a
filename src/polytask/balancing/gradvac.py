"""GradVac: gradient vaccine (Wang, Tsvetkov, Firat and Cao, ICLR 2021, arXiv:2010.05874)."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.registry import register

TINY = float(np.finfo(np.float64).tiny)


@register(
    "gradvac",
    family="balancing",
    paper="arXiv:2010.05874",
    needs="gramian",
    aliases=("gradient_vaccine",),
    invariances=("scale", "single"),
    exempt={"permutation": "corrections follow a random order: equivariant in distribution only (test_random.py)"},
)
class GradVac(GramianWeighting):
    r"""Raise the cosine of each pair of gradients to where it usually stands, then add the results.

    Where the cosine :math:`\phi` of :math:`\hat g_i` and :math:`g_j` lies below its moving average :math:`\rho_{ij}`,

    .. math:: \hat g_i \leftarrow \hat g_i + \frac{\lVert\hat g_i\rVert
        (\rho_{ij}\sqrt{1 - \phi^2} - \phi\sqrt{1 - \rho_{ij}^2})}{\lVert g_j\rVert\sqrt{1 - \rho_{ij}^2}}\, g_j

    then :math:`\rho_{ij} \leftarrow (1 - \beta)\rho_{ij} + \beta\phi`. The averages start at 0, where this is PCGrad;
    they are kept for the whole shared gradient (the paper also keeps them by layer).

    Args:
        beta: :math:`\beta`, weight of the newest cosine; the paper's 0.01 (LibMTL: 0.5).
        order: ``random``, drawn anew for each task and step, or ``ascending``.

    Cost: K operations on K x K numbers a step.
    """

    def __init__(
        self, *, beta: float = 0.01, order: Literal["random", "ascending"] = "random", **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if not 0 <= beta <= 1 or order not in ("random", "ascending"):
            raise InputError(
                f"gradvac takes a beta in [0, 1] and a 'random' or 'ascending' order, not {beta}, {order!r}"
            )
        self.beta, self.order = beta, order

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"rho": np.zeros((n_tasks, n_tasks))}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        k, rows, n = len(C), np.arange(len(C)), np.sqrt(np.diag(C))
        rho = self.state["rho"][np.ix_(self.active, self.active)]
        target = np.minimum(rho, 1 - 1e-12)
        sine, phi = np.sqrt(1 - target**2), np.empty((k, k))
        orders = np.tile(rows, (k, 1))
        if self.order == "random":
            orders = self.rng.permuted(orders, axis=1)
        A, H = np.eye(k), C.copy()  # coefficients of every corrected gradient, its products with the original ones
        squares = np.diag(C).copy()
        for j in orders.T:
            product, length = H[rows, j], np.sqrt(np.maximum(squares, 0.0))
            cosine = np.maximum(np.minimum(product / np.maximum(length * n[j], TINY), 1.0), -1.0)
            phi[rows, j] = cosine
            wanted, s = target[rows, j], sine[rows, j]
            raised = length * (wanted * np.sqrt(1 - cosine**2) - cosine * s) / (n[j] * s)
            raised[(cosine >= wanted) | (j == rows)] = 0.0
            squares += raised * (2 * product + raised * n[j] ** 2)
            A[rows, j] += raised
            H += raised[:, None] * C[j]
        rho = rho + self.beta * (phi - rho) * (1 - np.eye(k))
        self.state["rho"][np.ix_(self.active, self.active)] = rho
        return np.asarray(self.p @ A)

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
    they are kept for the whole shared gradient. For averages by layer or by matrix, as the paper and LibMTL's ``group_type`` have
    them, name the groups: ``polytask.backward(..., shared={name: parameters}, level="exact")``.

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
        k, n = len(C), np.sqrt(np.diag(C))
        orders = np.tile(np.arange(k), (k, 1))
        if self.order == "random":
            orders = self.rng.permuted(orders, axis=1)
        rho = self.state["rho"][np.ix_(self.active, self.active)]
        target = np.minimum(rho, 1 - 1e-12)
        # the correction of a unit vector is rho / sqrt(1 - rho^2) sqrt(1 - phi^2) - phi of a unit vector, where that is positive
        tangent = np.take_along_axis(target / np.sqrt(1 - target**2), orders, 1).T.copy()
        others = (orders != np.arange(k)[:, None]).T.astype(np.float64)
        R = C / n / n[:, None]
        H, piece = R.copy(), np.empty_like(R)  # products of every corrected unit gradient with unit ones
        square, met = np.ones(k), np.empty((k, k))  # its length^2, and as it was at each correction
        at = (orders + k * np.arange(k)[:, None]).T.copy()
        phi, raised = np.empty((k, k)), np.empty((k, k))
        for t, j in enumerate(orders.T):
            phi[t] = product = H.take(at[t])
            met[t] = square
            # length * sine, and length * cosine is the product
            r = square - product * product
            r = np.sqrt(np.maximum(r, 0.0, out=r), out=r)
            r *= tangent[t]
            r -= product
            np.maximum(r, 0.0, out=r)
            raised[t] = r = r * others[t]
            product += product
            product += r
            square += r * product
            np.take(R, j, axis=0, out=piece, mode="clip")
            piece *= r[:, None]
            H += piece
        phi = np.clip(phi / np.sqrt(np.maximum(met, TINY)), -1.0, 1.0)
        A, cosines = np.empty((k, k)), np.empty((k, k))  # coefficients of every corrected gradient
        np.put_along_axis(A, orders, raised.T, 1)
        np.put_along_axis(cosines, orders, phi.T, 1)
        self.state["rho"][np.ix_(self.active, self.active)] = rho + self.beta * (cosines - rho) * (1 - np.eye(k))
        return np.asarray(self.p + (self.p * n) @ A / n)

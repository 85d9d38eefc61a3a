"""PCGrad: gradient surgery (Yu et al., NeurIPS 2020, arXiv:2001.06782)."""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.registry import register


@register(
    "pcgrad",
    family="balancing",
    paper="arXiv:2001.06782",
    needs="gramian",
    aliases=("projecting_conflicting_gradients", "gradient_surgery"),
    invariances=("scale", "single"),
    exempt={"permutation": "projections follow a random order: equivariant in distribution only (test_random.py)"},
)
class PCGrad(GramianWeighting):
    r"""Take out of each gradient what opposes the others, one after another, and add what is left.

    .. math:: \hat g_i \leftarrow \hat g_i - \frac{\min(\langle \hat g_i, g_j\rangle, 0)}{\lVert g_j\rVert^2}\, g_j
        \quad \text{for } j \ne i \text{ in random order}, \qquad d = \sum_i p_i \hat g_i

    Works on the coefficients of :math:`\hat g_i`, for all i at once. Free of conflict for two tasks, not in general.

    Args:
        order: ``random``, drawn anew for each task and step, or ``ascending``.
        average: divide by K, as the authors' code does; the paper's algorithm, LibMTL and TorchJD add.

    Cost: K operations on K x K numbers a step.
    """

    def __init__(
        self, *, order: Literal["random", "ascending"] = "random", average: bool = False, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if order not in ("random", "ascending"):
            raise InputError(f"pcgrad projects in 'random' or 'ascending' order, not {order!r}")
        self.order, self.average = order, average

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        k = len(C)
        rows = np.arange(k)
        orders = np.tile(rows, (k, 1))
        if self.order == "random":
            orders = self.rng.permuted(orders, axis=1)
        H = C.copy()  # products of every surgically changed gradient with the original ones
        others = (orders != rows[:, None]) / np.diag(C)[orders]
        taken, piece = np.empty((k, k)), np.empty_like(C)
        for t, j in enumerate(orders.T):
            taken[t] = opposed = np.minimum(H[rows, j], 0.0) * others[:, t]
            np.take(C, j, axis=0, out=piece, mode="clip")
            piece *= opposed[:, None]
            H -= piece
        A = np.empty((k, k))  # what is taken out of every gradient, as coefficients
        np.put_along_axis(A, orders, taken.T, 1)
        w = self.p - self.p @ A
        return np.asarray(w / k if self.average else w)

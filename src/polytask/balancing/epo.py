"""EPO search: exact Pareto optimal search (Mahapatra and Rajan, ICML 2020, arXiv:2010.06313)."""

from __future__ import annotations

import logging
from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.ray import losses_for_ray
from polytask.errors import InputError
from polytask.linalg import correlation, linear_program, opposed
from polytask.registry import register

logger = logging.getLogger(__name__)

BALANCED = 1e-6  # below which the losses' rounding decides where the ray lies


@register(
    "epo",
    family="balancing",
    paper="arXiv:2010.06313",
    needs="gramian",
    aliases=("EPO_search", "exact_pareto_optimal"),
    invariances=("permutation", "scale", "single"),
    exempt={"descent": "a loss below the ray of the preference may rise until the losses are in proportion to it"},
)
class EPO(GramianWeighting):
    r"""Bring the losses into proportion to the preference, then lower them all along its ray.

    With :math:`r = 1/p`, shares :math:`\hat l \propto r \circ L` that sum to 1, their non-uniformity
    :math:`\mu = \sum_i \hat l_i \log K \hat l_i` and :math:`a = r \circ (\log K \hat l - \mu)`,

    .. math::
        \mu > \epsilon: \quad & \max_{w \in \Delta} w^\top C a \quad \text{s.t.} \quad
            (Cw)_j \ge \begin{cases} 0 & \hat l_j \text{ largest} \\ (Ca)_j & (Ca)_j \le 0 \end{cases} \\
        \mu \le \epsilon: \quad & \max_{w \in \Delta} 1^\top C w \quad \text{s.t.} \quad Cw \ge 0, \;
            w^\top C a \ge \min(0, \max Ca)

    and :math:`Cw \ge 0` alone where no :math:`(Ca)_j` is positive. The weights sum to 1; where no point is feasible they are
    :math:`p / 1^\top p`. The preference is a **ray**: a larger number lets a task end with a larger loss.

    Args:
        epsilon: non-uniformity up to which the losses count as being on the ray.

    Cost: one linear program of K unknowns a step. Losses must be positive.
    """

    def __init__(self, *, epsilon: float = 1e-4, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not epsilon > 0:
            raise InputError(f"the non-uniformity epsilon of epo is positive, not {epsilon}")
        self.epsilon = epsilon

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        p, k = self.p, len(C)
        r = 1 / p
        l_hat = r * losses_for_ray(self, losses)
        l_hat = np.maximum(l_hat / l_hat.sum(), np.finfo(np.float64).eps)
        mu = float(l_hat @ np.log(k * l_hat))
        Ca = C @ (r * (np.log(k * l_hat) - mu))
        if mu > self.epsilon:
            least = np.zeros(k)
            if (Ca > 0).any():
                least = np.where(l_hat == l_hat.max(), 0.0, np.where(Ca > 0, -np.inf, Ca))
            w = _best(C, Ca, least)
        else:
            w = opposed(C, self.precision)
            if w is not None:
                logger.info("the gradients leave no direction that raises no loss: epo takes weights of a sum of 0")
                return w
            w = _best(C, C.sum(0), np.zeros(k), Ca / r.max())
        return p / p.sum() if w is None else w


def _best(C: Matrix, gain: Vector, least: Vector, balance: Vector | None = None) -> Vector | None:
    """The w of the simplex with the largest gain'w, Cw >= least and balance'w >= min(0, max balance), by unit vectors: y = w n / min n."""
    R, n = correlation(C)
    unit = n.min() / n
    A, b = R, least / (n * n.min())
    if balance is not None and np.abs(row := balance * unit / (n.min() * n.max())).max() > BALANCED:
        A, b = np.vstack([A, row]), np.append(b, min(0.0, float(balance.max())) / (n.min() * n.max()))
    y = linear_program(gain * unit / np.abs(gain * unit).max(), A, b, unit)
    return None if y is None else y * unit

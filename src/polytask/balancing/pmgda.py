"""PMGDA: preference-based multiple gradient descent (Zhang, Lin and Zhang, 2024, arXiv:2402.09492)."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.ray import losses_for_ray, off_ray
from polytask.errors import InputError
from polytask.linalg import linear_program, min_norm_point
from polytask.registry import register

FLAT = 1e-9


@register(
    "pmgda",
    family="balancing",
    paper="arXiv:2402.09492",
    needs="gramian",
    aliases=("preference_mgda",),
    invariances=("permutation", "scale"),
    exempt={"descent": "a loss below the ray of the preference is raised to it: weights may be negative"},
)
class PMGDA(GramianWeighting):
    r"""Correct the distance of the losses from the ray of the preference first, at the least cost to any loss; then follow MGDA.

    With the distance :math:`h = \lVert (I - uu^\top) L\rVert`, :math:`u = p/\lVert p\rVert`, and
    :math:`\hat g_h = \nabla h / \lVert\nabla h\rVert`, :math:`\nabla h = \sum_i \partial h / \partial L_i\, g_i`, while
    :math:`h > \epsilon \lVert L\rVert`

    .. math:: \max_{\mu \in \Delta_{K+1}} \min_i \langle g_i, d\rangle \quad \text{s.t.} \quad
        \langle \hat g_h, d\rangle \ge \sigma, \qquad d = \sum_i \mu_i \hat g_i + \mu_h \hat g_h

    with unit gradients, d times the root mean square of the gradients' lengths; then the shortest vector in the convex hull of
    the gradients. The preference is a **ray**: a larger number lets a task end with a larger loss.

    Args:
        epsilon: distance from the ray, as a share of the losses' length, that is left uncorrected.
        sigma: :math:`\sigma`, how far towards the ray a correction goes, in (0, 1].

    Cost: one linear program of K + 2 unknowns a step, or one active-set solve.
    """

    def __init__(self, *, epsilon: float = 0.01, sigma: float = 0.95, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not (epsilon > 0 and 0 < sigma <= 1):
            raise InputError(f"pmgda takes epsilon above 0 and sigma in (0, 1], not {epsilon} and {sigma}")
        self.epsilon, self.sigma = epsilon, sigma

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        h = off_ray(losses_for_ray(self, losses), self.p)
        distance, k = float(np.linalg.norm(h)), len(C)
        slope = h / distance if distance > 0 else h  # dh / dL
        steepness = np.sqrt(max(float(slope @ C @ slope), 0.0))
        if distance <= self.epsilon or steepness <= FLAT:
            return min_norm_point(C, self.precision)
        n = np.sqrt(np.diag(C))
        unit = np.vstack([np.diag(1 / n), slope / steepness])  # the weights of all unit gradients, that of h last
        gain = C @ unit.T
        # the last unknown is the worst gain in units of max n, counted from -1 since it may be negative
        A = np.vstack([np.column_stack([gain / n.max(), -np.ones(k)]), np.append(slope @ gain / steepness, 0.0)])
        b = np.append(np.full(k, -1.0), self.sigma)
        y = linear_program(np.eye(k + 2)[-1], A, b, np.append(np.ones(k + 1), 0.0))
        mu = np.eye(k + 1)[-1] if y is None else y[:-1]
        return np.asarray(mu @ unit)

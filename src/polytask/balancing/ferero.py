"""FERERO: flexible preference-guided multi-objective learning (Chen et al., NeurIPS 2024, arXiv:2412.01773)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.ray import losses_for_ray, off_ray
from polytask.errors import InputError
from polytask.linalg import project_simplex, ridge, simplex_qp
from polytask.registry import register


@register(
    "ferero",
    family="balancing",
    paper="arXiv:2412.01773",
    needs="gramian",
    aliases=("PMOL",),
    invariances=("permutation", "scale", "single"),
    exempt={"descent": "a loss below the ray of the preference is raised to it: weights may be negative"},
)
class FERERO(GramianWeighting):
    r"""Descend on all losses while their distance from the ray of the preference shrinks at a given rate.

    With :math:`h = (I - uu^\top) L / \lVert L\rVert`, :math:`u = p/\lVert p\rVert`, the dual of the paper's problem,

    .. math:: \min_{\lambda \in \Delta,\; \nu \perp p}\; \tfrac12 (\lambda + \nu)^\top C (\lambda + \nu) + \tfrac\rho2
        \lVert\nu\rVert^2 - c\, \nu^\top h, \qquad w = \lambda + \nu,

    makes :math:`(I - uu^\top)\, C w \to c\, h`: along d the losses return to the ray at the rate c, and the rest of d is
    MGDA's. C is measured by its mean diagonal, as every tolerance here. The ridge :math:`\rho` keeps d bounded where
    gradients are nearly parallel, as stopping early does for the authors' projected gradient steps. The preference is a
    **ray**: a larger number lets a task end with a larger loss.

    Args:
        c: rate of return to the ray.
        ridge: :math:`\rho`; towards 0 the problem is the paper's.
        single_loop: take one projected gradient step on :math:`(\lambda, \nu)` a step, from the last ones, instead of solving.
        lr: its step size.

    Cost: one K x K solve and a small quadratic program a step; a product with C in the single loop.
    """

    def __init__(
        self,
        *,
        c: float = 1.0,
        ridge: float = 1e-3,
        single_loop: bool = False,
        lr: float = 0.1,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if not (c > 0 and ridge > 0 and lr > 0):
            raise InputError(f"ferero takes c, ridge and lr above 0, not {c}, {ridge} and {lr}")
        self.c, self.ridge, self.single_loop, self.lr = c, ridge, single_loop, lr

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {"lambda": np.full(n_tasks, 1 / n_tasks), "nu": np.zeros(n_tasks)}

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        h = off_ray(losses_for_ray(self, losses), self.p)
        u = self.p / np.linalg.norm(self.p)
        if self.single_loop:
            return self._step(C, np.eye(len(C)) - np.outer(u, u), h)
        X = C - np.outer(u, u @ C)
        # along u, where nu has no part, the system is 1
        S = X - np.outer(X @ u - u, u) + self.ridge * np.eye(len(C))
        across = np.linalg.solve(S, np.column_stack([X, self.c * h]))
        # 0 up to rounding where the gradients are Pareto stationary
        reduced = C - C @ across[:, :-1] + ridge(len(C), self.precision) * np.eye(len(C))
        lam = simplex_qp((reduced + reduced.T) / 2, C @ across[:, -1], self.precision)
        return np.asarray(lam + across[:, -1] - across[:, :-1] @ lam)

    def _step(self, C: Matrix, across: Matrix, h: Vector) -> Vector:
        before = self.state["lambda"][self.active]
        lam, nu = (
            before / before.sum() if before.sum() > 0 else np.full(len(C), 1 / len(C)),
            self.state["nu"][self.active],
        )
        nu = across @ nu  # tasks may have left since the last step
        slope = C @ (lam + nu)
        lam = project_simplex(lam - self.lr * slope)
        nu = nu - self.lr * (across @ slope + self.ridge * nu - self.c * h)
        self.state["lambda"][self.active], self.state["nu"][self.active] = lam * before.sum(), nu
        return np.asarray(lam + nu)

"""Pareto MTL (Lin, Zhen, Li, Zhang and Kwong, NeurIPS 2019, arXiv:1912.12854)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.balancing.ray import losses_for_ray
from polytask.errors import InputError
from polytask.linalg import min_norm_point
from polytask.registry import register


@register(
    "pmtl",
    family="balancing",
    paper="arXiv:1912.12854",
    needs="gramian",
    aliases=("pareto_mtl",),
    invariances=("permutation", "scale", "single"),
    exempt={"descent": "a loss may be raised to bring the losses nearer to this ray than to the others"},
)
class PMTL(GramianWeighting):
    r"""Keep the losses nearer to one's own ray than to the other ones, and descend on all of them.

    With unit rays u (the preference's) and :math:`u_j` (the others'), and the constraints that are broken,
    :math:`I = \{j : \langle u_j - u, L\rangle > 0\}`, d is the shortest vector in the convex hull of

    .. math:: \text{stage 1:} \;\; \{(u_j - u)^\top G\}_{j \in I} \qquad
        \text{stage 2:} \;\; \{g_i\} \cup \{(u_j - u)^\top G\}_{j \in I}

    Stage 1 ends when no constraint is broken, or after ``warmup`` steps. The preference is a **ray**: a larger number lets a task
    end with a larger loss.

    Args:
        others: the other rays, each with one number a task, at least 0, in the order bound. When omitted: for each task the ray
            half-way between one's own and the axis of its loss.
        warmup: the most steps of stage 1; a fifth of the training in the paper.

    Cost: one active-set solve of at most K plus the number of other rays unknowns a step.
    """

    def __init__(
        self, *, others: Sequence[Sequence[float]] | None = None, warmup: int = 200, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        rays = None if others is None else [list(ray) for ray in others]
        if rays is not None and not all(np.isfinite(r).all() and min(r, default=-1) >= 0 and max(r) > 0 for r in rays):
            raise InputError(f"each of the other rays of pmtl holds numbers from 0 on, not all 0: {rays}")
        self.others, self.warmup = rays, warmup

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        wrong = [ray for ray in self.others or () if len(ray) != n_tasks]
        if wrong:
            raise InputError(f"the ray {wrong[0]} of pmtl has {len(wrong[0])} numbers for {n_tasks} tasks")
        return {"steps": 0, "within": False}

    def _rays(self, u: Vector) -> Matrix:
        rays = u + np.eye(len(u)) if self.others is None else np.asarray(self.others, dtype=np.float64)[:, self.active]
        rays = rays[rays.any(1)]
        return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        F = losses_for_ray(self, losses)
        u = self.p / np.linalg.norm(self.p)
        towards = self._rays(u) - u
        broken = towards[towards @ F > 1e-12 * np.linalg.norm(F)]
        self.state["within"] = self.state["within"] or not len(broken) or self.state["steps"] >= self.warmup
        self.state["steps"] += 1
        rows = np.vstack([np.eye(len(C)), broken]) if self.state["within"] else broken
        a = min_norm_point(rows @ C @ rows.T, self.precision)
        return np.asarray(a @ rows)

"""CoBa: convergence balancer (Gong, Yu, Liao, Liu, Chen and Li, EMNLP 2024, arXiv:2410.06741)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from polytask.balancing.base import BaseOptions, Role, Vector
from polytask.balancing.looks import LookingBalancer, Looks
from polytask.balancing.validation_slopes import record, shares, slopes, softmax, start
from polytask.errors import InputError
from polytask.registry import register


@register(
    "coba",
    family="balancing",
    paper="arXiv:2410.06741",
    needs="several batches",
    aliases=("convergence_balancer",),
    invariances=("permutation", "scale", "single"),
)
class CoBa(LookingBalancer):
    r"""Let all tasks converge alike, and none diverge, by the slopes of their validation losses.

    With :math:`\alpha_i(t)` the slope of the last N validation losses of task i, each divided by the first, and
    :math:`\alpha_{max}(t)` that of the largest of these ratios:

    .. math:: RCS_i &= \mathrm{softmax}_i\Bigl(K \frac{\alpha_i(t)}{\sum_j |\alpha_j(t)|}\Bigr), \qquad
        ACS_i = \mathrm{softmax}_i\Bigl(-N \frac{\alpha_i(t)}{\sum_{s} |\alpha_i(s)|}\Bigr) \\
        DF &= \min\Bigl(1,\; t \cdot \mathrm{softmax}_t\Bigl(-\tau t \frac{\alpha_{max}(t)}{\sum_s |\alpha_{max}(s)|}\Bigr)\Bigr), \qquad
        w_i = DF \cdot RCS_i + (1 - DF) \cdot ACS_i

    Slow tasks get more (relative convergence score) as long as the model as a whole converges (divergence factor); then those that still
    go down (absolute convergence score). Weights sum to 1 and act on the parameters of single tasks too; a preference multiplies them.
    All histories end after N steps here, where the divergence factor's goes back to the start in the paper (t counts what it holds); the
    authors' code takes a further softmax of K w, and no minimum [the minimum is inferred from the paper's text].

    Args:
        window: N.
        warmup: steps with equal weights.
        tau: :math:`\tau`, sharpness of the divergence factor.

    Cost: one forward pass of a validation batch, without graph.
    """

    roles: tuple[Role, ...] = ("train", "validation")
    weighs_heads = True

    def __init__(self, *, window: int = 200, warmup: int = 100, tau: float = 5.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not (window >= 2 and warmup >= 0 and tau > 0):
            raise InputError(f"coba needs window >= 2, warmup >= 0 and tau > 0, not {window}, {warmup} and {tau}")
        self.window, self.warmup, self.tau = window, warmup, tau

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return {
            **start(n_tasks, self.window),
            "first": np.full(n_tasks, np.nan),
            "slopes": np.full((n_tasks, self.window), np.nan),
            "largest": start(1, self.window),
            "largest_slopes": np.full((1, self.window), np.nan),
            "steps": 0,
        }

    def look(self, looks: Looks) -> tuple[Tensor, Tensor]:
        state = self.state
        state["steps"] += 1
        found = looks.losses_without_graph(1)
        at = np.array([i for i, n in zip(self.active, looks.names, strict=True) if n in found], dtype=np.intp)
        if len(at):
            values = torch.stack(list(found.values())).double().cpu().numpy()
            first = state["first"]
            first[at] = np.where(np.isnan(first[at]) | (first[at] == 0), values, first[at])
            ratio = np.divide(values, first[at], out=np.ones_like(values), where=first[at] != 0)
            record(state, at, ratio, state["steps"])
            record(state["largest"], np.zeros(1, dtype=np.intp), ratio.max(keepdims=True), state["steps"])
        K = len(self.active)
        w = np.full(K, 1 / K) if state["steps"] <= self.warmup else self._scores()
        weights = torch.as_tensor(self.p * w).to(looks.values)
        return looks.slope(0, weights), weights

    def _scores(self) -> Vector:
        state = self.state
        one = np.zeros(1, dtype=np.intp)
        slope = slopes(state, self.active)
        state["slopes"][self.active] = _appended(state["slopes"][self.active], slope)
        state["largest_slopes"] = _appended(state["largest_slopes"], slopes(state["largest"], one))
        relative = softmax(shares(slope))
        absolute = softmax(np.array([-_of_its_kind(row)[-1] for row in state["slopes"][self.active]]))
        z = _of_its_kind(state["largest_slopes"][0])
        factor = min(1.0, len(z) * float(softmax(-self.tau * z)[-1]))
        return factor * relative + (1 - factor) * absolute


def _appended(rows: Any, new: Vector) -> Any:
    return np.concatenate([rows[:, 1:], new[:, None]], 1)


def _of_its_kind(row: Vector) -> Vector:
    """The values seen so far, in units of their mean size."""
    return shares(row[~np.isnan(row)])

"""Modified GradNorm: once an epoch, at task-specific bottlenecks (Natan and Miura, IEEE T-ITS 2022, arXiv:2606.02979)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import leaves
from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.balancing.rows import rows_of
from polytask.errors import InputError
from polytask.registry import register

PLATEAU_FACTOR, PLATEAU_PATIENCE, LEAST_LR = 0.5, 4, 1e-4


@register(
    "modified_gradnorm",
    family="balancing",
    paper="arXiv:2606.02979",
    needs="losses",
    aliases=("MGN", "epoch_gradnorm"),
    invariances=("permutation", "single"),
    exempt={
        "scale": "the weights move in steps measured by gradient lengths, as published: losses in other units move them otherwise"
    },
)
class ModifiedGradNorm(LossWeighting):
    r"""Give every task a gradient as long as its pace within the epoch calls for, measured once, at the epoch's last batch.

    With :math:`l_i` the losses of that batch, :math:`b_i` the parameters at which task i is measured, and the weighted losses
    :math:`L_i = p_i w_i l_i` of the epoch's first batch as :math:`L_i^{(0)}`,

    .. math:: G_i = \lVert \nabla_{b_i} L_i \rVert, \quad r_i = \frac{L_i / L_i^{(0)}}{\mathrm{mean}_j\, L_j / L_j^{(0)}}, \quad
        c_i = \bar G\, r_i^\alpha \text{ (held constant)}, \quad w \leftarrow w - \eta\, \nabla_w \textstyle\sum_i |G_i - c_i|

    with :math:`\partial |G_i - c_i| / \partial w_i = \mathrm{sign}(G_i - c_i)\, \lVert \nabla_{b_i} p_i l_i \rVert`; then w is kept
    above a floor and scaled to sum to K. Epochs are counted by ``begin_epoch()``.

    Args:
        alpha: :math:`\alpha`, how strongly a slow task is pushed.
        lr: :math:`\eta`; ``after_validation`` halves it where validation stands still.
        references: {task: :math:`b_i`}; for tasks not named, all parameters that another task's loss reaches too.
        batches: in an epoch; learnt from the first epoch, which then leaves w as it is, when omitted.
        least: floor of w; without one, weights can become negative and training diverges. The floor is ours.
        faithful: as the published program does it: the gradient of w at the last batch holds :math:`l_i` too, and
            :math:`\sum_i |G_i - c_i|` is differentiated into the model.

    Cost: one backward pass a step; at the last batch of an epoch one more a task, down to its :math:`b_i`.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.5,
        lr: float = 0.1,
        references: Mapping[str, Tensor] | None = None,
        batches: int | None = None,
        least: float = 0.05,
        faithful: bool = False,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        if not lr > 0 or not least < 1 or (batches is not None and batches < 1):
            raise InputError(
                f"modified_gradnorm takes lr > 0, least < 1 and at least 1 batch, not {lr}, {least} and {batches}"
            )
        self.alpha, self.lr, self.batches, self.least, self.faithful = alpha, lr, batches, least, faithful
        self.references = references

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        unknown = sorted(set(self.references or {}) - set(self.tasks or ()))
        if unknown:
            raise InputError(f"modified_gradnorm was given a reference for {unknown[0]!r}, which is not a task")
        return {
            "w": torch.ones(n_tasks, dtype=torch.float32),
            "first": torch.full((n_tasks,), torch.nan, dtype=torch.float32),
            "batch": 0,
            "batches": self.batches or 0,  # 0: not known yet
            "lr": self.lr,
            "best": float("inf"),
            "worse": 0,
        }

    def begin_epoch(self) -> None:
        if not self.state or not self.state["batch"]:
            return
        if self.batches is None:
            self.state["batches"] = self.state["batch"]
        self.state["batch"] = 0
        self.state["first"].fill_(torch.nan)

    def after_validation(self, metric: float) -> None:
        """Halve the step of the weights (not below 1e-4) once the metric, lower being better, has not improved for five epochs."""
        s = self.state
        better = math.isinf(s["best"]) or metric < s["best"] - 1e-4 * abs(s["best"])
        s["best"], s["worse"] = (metric, 0) if better else (s["best"], s["worse"] + 1)
        if s["worse"] > PLATEAU_PATIENCE:
            s["lr"], s["worse"] = max(s["lr"] * PLATEAU_FACTOR, LEAST_LR), 0

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        rows = rows_of(self.active, len(self.state["w"]), losses.device)
        for key in ("w", "first"):
            self.state[key] = self.state[key].to(losses.device)
        w = self.state["w"][rows].to(losses) * torch.as_tensor(self.p).to(losses)
        L = w * losses
        first = self.state["first"][rows]
        self.state["first"][rows] = torch.where(torch.isnan(first), L.detach().float(), first)
        self.state["batch"] += 1
        total = L.sum()
        if self.state["batch"] == self.state["batches"] and losses.requires_grad and len(losses) > 1:
            total = total + self._measure(losses, w, rows)
        return total, w

    def _measure(self, losses: Tensor, w: Tensor, rows: Any) -> Tensor | float:
        """Move the weights of the tasks present; returns what the published program differentiates into the model, else 0."""
        p = torch.as_tensor(self.p).to(losses)
        g = self._lengths(losses)  # of the gradients of l_i
        G = w * g
        ratio = w * losses.detach() / self.state["first"][rows].to(losses)
        c = (G.mean() * (ratio / ratio.mean()).clamp_min(torch.finfo(G.dtype).eps) ** self.alpha).detach()
        slope = (torch.sign(G - c) * p * g).detach()
        if self.faithful:
            slope = slope + p * losses.detach()
        moved = self.state["w"].clone()
        moved[rows] -= self.state["lr"] * slope.float()
        moved.clamp_min_(self.least)
        self.state["w"] = moved * (len(moved) / moved.sum())
        return (G - c).abs().sum() if self.faithful else 0.0

    def _lengths(self, losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        names = [(self.tasks or ())[i] for i in self.active]
        everything = leaves(losses)
        gradients = [
            torch.autograd.grad(
                loss,
                everything,
                retain_graph=True,
                create_graph=self.faithful,
                allow_unused=True,
                materialize_grads=True,
            )
            for loss in losses.unbind()
        ]
        readers = [sum(bool(mine[j].any()) for mine in gradients) for j in range(len(everything))]
        where = {id(p): j for j, p in enumerate(everything)}
        lengths = []
        for name, mine in zip(names, gradients, strict=True):
            reference = (self.references or {}).get(name)
            if reference is not None and id(reference) not in where:
                raise InputError(f"no loss reaches the parameter at which modified_gradnorm measures {name!r}")
            at = [where[id(reference)]] if reference is not None else [j for j, n in enumerate(readers) if n > 1]
            lengths.append(torch.stack([mine[j].norm() for j in at] or [losses.new_zeros(())]).norm())
        return torch.stack(lengths)

"""IMTL: impartial multi-task learning, both parts together (Liu et al., ICLR 2021)."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch

from polytask.balancing.base import BaseOptions, Matrix, Vector
from polytask.balancing.imtl_g import IMTLG
from polytask.balancing.inner_adam import InnerAdam
from polytask.errors import InputError
from polytask.registry import register


@register(
    "imtl",
    family="balancing",
    paper="openreview:IMPnRXEWpvr",
    needs="gramian",
    aliases=("IMTL_hybrid",),
    invariances=("permutation", "scale"),
)
class IMTL(IMTLG):
    r"""Learn scales that bring all losses to 1 (IMTL-L), then find equal projections on the scaled gradients (IMTL-G).

    .. math:: w_i = e^{s_i} \alpha_i, \qquad \alpha = \text{IMTL-G of the Gramian } e^{s_i} C_{ij}\, e^{s_j}

    where the scales s descend :math:`\sum_i e^{s_i} L_i - s_i` by an Adam of their own. Task heads receive the
    gradient of their unscaled loss (an optimizer that adapts to scale, such as Adam, does not see the difference).

    Args:
        lr: step size of s.

    Cost: IMTL-G's, and a dozen operations on K numbers.
    """

    def __init__(self, *, lr: float = 0.025, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        self.lr = lr
        self.adam = InnerAdam("log_scale", lr)

    def initial_state(self, n_tasks: int) -> dict[str, Any]:
        return self.adam.start(n_tasks, 0.0)

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        if losses is None:
            raise InputError("imtl learns from the values of the losses: give losses=")
        rows = torch.from_numpy(self.active)
        scale = torch.exp(self.adam.read(self.state, rows, rows.device)).double().numpy()
        self.adam.step(self.state, rows, torch.from_numpy(scale * losses - 1))
        return np.asarray(scale * super().solve(C * scale * scale[:, None], losses))

"""WUDI-Merging (Cheng et al., ICML 2025, arXiv:2503.08099)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.errors import InputError
from polytask.merging.base import MatrixMerger, Place, TaskVectorOptions
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "wudi",
    family="merging",
    paper="arXiv:2503.08099",
    needs="base",
    aliases=("wudi_merging",),
    invariances=("permutation",),
    exempt={
        "copies": "the descent starts from the sum of the task vectors and is stopped early",
        "scale": "Adam's steps have a length of their own",
    },
)
class WUDI(MatrixMerger):
    r"""Move the sum of the task vectors until it disturbs no expert on the inputs that its own task vector stands for.

    .. math:: M = \arg\min_X \sum_t \frac{1}{\lVert\tau_t\rVert_F^2} \bigl\lVert (X - \tau_t)\, \tau_t^\top \bigr\rVert_F^2

    by Adam from :math:`X = \sum_t \tau_t`. The gradient is :math:`2 (X A - B)` with
    :math:`A = \sum_t \tau_t^\top \tau_t / \lVert\tau_t\rVert^2` and
    :math:`B = \sum_t \tau_t \tau_t^\top \tau_t / \lVert\tau_t\rVert^2`: a step costs one product, whatever the number of experts.
    Tensors that are not matrices get the mean task vector.

    Args:
        steps: steps of Adam.
        learning_rate: of Adam.

    Cost: 2 m n^2 multiplications a step; memory for four more tensors.
    """

    scratch = 6.0

    def __init__(self, *, steps: int = 300, learning_rate: float = 1e-5, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        if steps < 0 or not learning_rate > 0:
            raise InputError(f"wudi takes steps >= 0 and a learning rate > 0, not {steps} and {learning_rate}")
        self.steps, self.learning_rate = steps, learning_rate

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:  # noqa: ARG002
        X = D.sum(0)
        A = X.new_zeros(X.shape[1], X.shape[1])
        B = torch.zeros_like(X)
        for tau in D:
            square = float(tau.norm()) ** 2
            if square > 0:
                own = (tau.T @ tau).div_(square)
                B.addmm_(tau, own)
                A += own
        optimizer = torch.optim.Adam([X], lr=self.learning_rate)
        for _ in range(self.steps):
            X.grad = (X @ A).sub_(B).mul_(2)
            optimizer.step()
        X.grad = None
        return X

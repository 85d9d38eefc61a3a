"""OPCM: orthogonal projection for continual merging (Tang et al., NeurIPS 2025, arXiv:2501.09522)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, in_range, per_expert
from polytask.merging.spectral import leading_triplets
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "opcm",
    family="merging",
    paper="arXiv:2501.09522",
    needs="base",
    aliases=("orthogonal_projection_continual_merging",),
    invariances=("scale", "rotation"),
    exempt={
        "permutation": "experts come one after another, and each is kept off what came before",
        "copies": "a repeated matrix is projected away, a repeated bias is added up",
    },
)
class OPCM(TaskVectorMerger):
    r"""Add one expert after another, each without what already points the way of the sum; the sum keeps the experts' mean length.

    .. math:: A_1 = \tau_1, \qquad A_t = A_{t-1} + \tau_t - U C V^\top, \qquad
        M = \frac{\frac1T \sum_t \lVert\tau_t\rVert}{\lVert A_T\rVert}\, A_T

    with :math:`A_{t-1} = U \operatorname{diag}(\sigma) V^\top`, and C the entries of :math:`P = U^\top \tau_t V` that are taken away: its
    diagonal, and those of the first r rows and columns, where the r leading singular values sum to no more than
    :math:`\alpha \sum_i \sigma_i`. Lengths are taken over the whole model. This is the authors' recursion: their :math:`\lambda_t` rescale
    the sum at every step to the mean length so far, which changes no direction. Tensors that are not matrices are added up unprojected;
    directions with negligible singular values count as none.

    The order of the experts matters: the first one is kept whole.

    Args:
        alpha: :math:`\alpha`; 0 takes away the diagonal alone.

    Cost: T - 1 eigendecompositions of the smaller side and products with the task vectors. Sums wait, in a file where models are on disk,
    until the lengths over the whole model are known.
    """

    passes = 1
    scratch = 18.0  # decompositions in float64

    def __init__(self, *, alpha: float = 0.5, **base: Unpack[TaskVectorOptions]) -> None:
        super().__init__(**base)
        in_range(alpha, "alpha of opcm", 0, 1)
        self.alpha = alpha
        self.kept = {}
        self.begin()

    def begin(self) -> None:
        self.squares: list[float] = []
        self.square = 0.0

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:  # noqa: ARG002
        w = per_expert(self.weights, len(D), "weights")
        if place.name not in self.kept:
            self.kept[place.name] = self.added_up(D, w)
        own = [(a * float(tau.norm(dtype=torch.float64))) ** 2 for a, tau in zip(w, D, strict=True)]
        self.squares = [s + new for s, new in zip(self.squares or [0.0] * len(D), own, strict=True)]
        self.square += float(self.kept[place.name].norm(dtype=torch.float64)) ** 2

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        mean = sum(s**0.5 for s in self.squares) / len(self.squares)
        return self.kept[place.name] * (mean / self.square**0.5 if self.square > 0 else 1.0)

    def added_up(self, D: Float[Tensor, "experts ..."], w: list[float]) -> Float[Tensor, "..."]:
        r""":math:`A_T` of one tensor."""
        A = w[0] * D[0]
        for a, tau in zip(w[1:], D[1:], strict=True):
            A += a * (self.projected(tau, A) if A.ndim == 2 and A.numel() else tau)
        return A

    def projected(self, tau: Float[Tensor, "m n"], A: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        r""":math:`\tau - U C V^\top`."""
        U, sigma, Vh = leading_triplets(A, min(A.shape))
        total = sigma.double().cumsum(0)
        r = int((total <= self.alpha * total[-1:]).sum())
        P = U.T @ tau @ Vh.T
        C = P.diagonal().diag()
        C[:r, :r] = P[:r, :r]
        return tau - U @ C @ Vh

"""DOGE: merging as adaptive projective gradient descent (Wei et al., ICML 2025, arXiv:2501.01230)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

import torch

from polytask.errors import InputError
from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, in_range, per_expert
from polytask.merging.spectral import leading_triplets
from polytask.merging.trim import Trim
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "doge",
    family="merging",
    paper="arXiv:2501.01230",
    needs="base",
    aliases=("doge_ta", "adaptive_projective_gradient_descent"),
    invariances=("permutation",),
    exempt={
        "copies": "every matrix gets a length of its own, and trimmed entries are gone for good",
        "scale": "every task vector is brought to one length, and Adam's steps have a length of their own",
    },
)
class DOGE(TaskVectorMerger):
    r"""Bring task vectors to one length, and shift all of them by what lets the sum agree with each expert along its own rows.

    .. math:: M = \sum_t \lambda_t\, m_t \odot (\tau_t + \Delta), \qquad \lambda_t = \frac{\eta\, w_t}{\lVert\tau_t\rVert_F}, \qquad
        \Delta = \arg\min_\Delta \sum_t \sum_r \Bigl\langle \tau_t^r,\ \tau_t^r - \sum_s \lambda_s (\tau_s^r + \Delta^r) \Bigr\rangle^2

    over rows r, with :math:`m_t` the largest share :math:`\rho` of the entries of :math:`\tau_t`. Adam starts from :math:`\Delta = 0`; of
    each gradient G it is given :math:`G - B B^\top G`, where B spans the directions that experts share: the leading left singular vectors
    of the experts' own leading ones, side by side.

    Every matrix moves by about :math:`\eta \sqrt T`, however far its experts did. Tensors that are not matrices stay the base's, as in
    the authors' code, which merges the weights of linear layers within the encoder alone.

    Args:
        eta: :math:`\eta`, the length that each task vector is brought to; 0.07 for eight CLIP models.
        density: :math:`\rho`.
        scope: where the thresholds of :math:`m_t` are looked for, see :class:`~polytask.merging.trim.Trim`; the authors take the model.
        shared: the columns of B, as a share of the rank; each expert puts forward its share 1/T of the rank.
        steps: of Adam.
        learning_rate: of Adam.

    Cost: T + 1 eigendecompositions of the smaller side; a step costs two passes over the task vectors.
    """

    weighs_itself = True
    scratch = 14.0  # the decomposition of a stack, in float64
    scratch_per_expert = 1.25

    def __init__(
        self,
        *,
        eta: float = 0.07,
        density: float = 0.3,
        scope: Literal["tensor", "model"] = "tensor",
        shared: float = 1 / 6,
        steps: int = 400,
        learning_rate: float = 1e-4,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        in_range(eta, "eta of doge", 0, float("inf"))
        in_range(shared, "the shared part of doge", 0, 1)
        if steps < 0 or not learning_rate > 0:
            raise InputError(f"doge takes steps >= 0 and a learning rate > 0, not {steps} and {learning_rate}")
        self.trim = Trim(density=density, scope=scope)
        self.eta, self.shared, self.steps, self.learning_rate = eta, shared, steps, learning_rate

    @property
    def passes(self) -> int:  # type: ignore[override]
        """As many as the trimming's."""
        return self.trim.passes

    def begin(self) -> None:
        self.trim.begin()

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:
        if W0.ndim == 2:
            self.trim.survey(W0, D, place)

    def end_pass(self) -> None:
        self.trim.end_pass()

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if D.ndim != 3 or 0 in D.shape:
            return torch.zeros_like(W0)
        norms = torch.stack([tau.norm() for tau in D])
        w = D.new_tensor(per_expert(self.weights, len(D), "weights"))
        lam = torch.where(norms > 0, self.eta * w / torch.where(norms > 0, norms, 1.0), 0.0)
        Delta = self.descend(D, lam)
        merged = torch.zeros_like(W0)
        for a, tau, largest in zip(lam, D, self.trim.apply(W0, D.clone(), place), strict=True):
            merged += tau.add_(Delta).mul_(largest != 0).mul_(a)
        return merged

    def descend(self, D: Float[Tensor, "experts m n"], lam: Float[Tensor, " experts"]) -> Float[Tensor, "m n"]:
        r""":math:`\Delta`."""
        B, reach = self.shared_space(D), lam.sum()
        total = torch.tensordot(lam, D, dims=1)
        start = torch.stack([(tau * (tau - total)).sum(1) for tau in D])
        Delta = torch.zeros_like(D[0])
        optimizer = torch.optim.Adam([Delta], lr=self.learning_rate)
        for _ in range(self.steps):
            gap = start - reach * torch.einsum("tmn,mn->tm", D, Delta)
            G = torch.einsum("tm,tmn->mn", gap, D).mul_(-2 * reach)
            Delta.grad = G - B @ (B.T @ G)
            optimizer.step()
        Delta.grad = None
        return Delta

    def shared_space(self, D: Float[Tensor, "experts m n"]) -> Float[Tensor, "m r"]:
        """B, orthonormal."""
        rank = min(D.shape[1:])
        own = [leading_triplets(tau, rank // len(D) or 1)[0] for tau in D]
        return leading_triplets(torch.cat(own, 1), int(self.shared * rank + 1e-9))[0]

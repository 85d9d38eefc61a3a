"""DOP: dual orthogonal projections for continual merging (NeurIPS 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

import torch

from polytask.errors import InputError
from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, in_range
from polytask.merging.spectral import leading_triplets
from polytask.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor


@register(
    "dop",
    family="merging",
    paper="Continual Model Merging without Data: Dual Projections for Balancing Stability and Plasticity, NeurIPS 2025",
    needs="base",
    aliases=("dual_orthogonal_projection",),
    invariances=("copies",),
    exempt={
        "permutation": "experts come one after another, and later ones weigh more",
        "scale": "Adam's steps have a length of their own",
    },
)
class DOP(TaskVectorMerger):
    r"""Merge one expert after another, each time between what was merged so far and the new one, in the directions that they use.

    .. math:: M_1 = \tau_1, \qquad M_t = \arg\min_X\ a\, L_{M_{t-1}}(X) + (1 - a)\, L_{\tau_t}(X), \qquad
        L_\tau(X) = \lVert \Sigma U^\top (X - \tau) \rVert_F^2 + \lVert (X - \tau) V \Sigma \rVert_F^2

    with :math:`\tau = U \Sigma V^\top`, cut after the singular value with which they sum to :math:`\epsilon` of the whole. Adam starts
    from the mean of the two. Before each step the weights move towards those whose combination of the two gradients, each divided by its
    loss, is the shortest: :math:`a \leftarrow \beta a + (1 - \beta)\, a^*`. Tensors that are not matrices get the mean of the two, so that
    the latest expert counts one half, the one before a quarter.

    Args:
        stability: a at first, the weight of what was merged before.
        momentum: :math:`\beta`; 1 keeps a as it is.
        energy: :math:`\epsilon`.
        space: ``uv`` for both terms, ``u`` for the first, ``v`` for the second.
        steps: of Adam.
        learning_rate: of Adam.

    Cost: 2 (T - 1) eigendecompositions of the smaller side; each of the steps multiplies a matrix four to six times with a square as large
    as its smaller side, which takes minutes for a few million entries.
    """

    scratch = 34.0  # two decompositions in float64, and squares of both sides for each of two models

    def __init__(
        self,
        *,
        stability: float = 0.8,
        momentum: float = 0.999,
        energy: float = 0.99999,
        space: Literal["uv", "u", "v"] = "uv",
        steps: int = 200,
        learning_rate: float = 1e-4,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        for value, name in ((stability, "stability"), (momentum, "momentum"), (energy, "energy")):
            in_range(value, f"{name} of dop", 0, 1)
        if space not in ("uv", "u", "v"):
            raise InputError(f"dop measures in the space 'uv', 'u' or 'v', not {space!r}")
        if steps < 0 or not learning_rate > 0:
            raise InputError(f"dop takes steps >= 0 and a learning rate > 0, not {steps} and {learning_rate}")
        self.stability, self.momentum, self.energy, self.space = stability, momentum, energy, space
        self.steps, self.learning_rate = steps, learning_rate

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        merged = D[0].clone()
        for tau in D[1:]:
            merged = self.between(merged, tau) if tau.ndim == 2 and tau.numel() else (merged + tau) / 2
        return merged

    def between(self, merged: Float[Tensor, "m n"], tau: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        r""":math:`M_t`, given :math:`M_{t-1}` and :math:`\tau_t`."""
        gradients = [self.gradient_of(target) for target in (merged, tau)]
        a, X = self.stability, (merged + tau) / 2
        optimizer = torch.optim.Adam([X], lr=self.learning_rate)
        for _ in range(self.steps):
            (old, G), (new, H) = (gradient(X) for gradient in gradients)
            gg, gh, hh = (inner(g, h) for g, h in ((G, G), (G, H), (H, H)))
            old, new = old or 1.0, new or 1.0
            a = self.momentum * a + (1 - self.momentum) * share_of_first(gg / old**2, gh / old / new, hh / new**2)
            X.grad = G.mul_(a).add_(H, alpha=1 - a)
            optimizer.step()
        X.grad = None
        return X

    def gradient_of(self, tau: Float[Tensor, "m n"]) -> Callable[[Tensor], tuple[float, Float[Tensor, "m n"]]]:
        r"""X to :math:`L_\tau(X)` and its gradient :math:`2 (U \Sigma^2 U^\top E + E\, V \Sigma^2 V^\top)`, :math:`E = X - \tau`."""
        P, Q = self.projections(tau)
        left, right = square(P), square(Q)

        def gradient(X: Float[Tensor, "m n"]) -> tuple[float, Float[Tensor, "m n"]]:
            E = X - tau
            G = left(E).add_(right(E.T).T).mul_(2)
            return inner(E, G) / 2, G

        return gradient

    def projections(self, tau: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"]]:
        r""":math:`U \Sigma` and :math:`V \Sigma`, empty where the space leaves them out."""
        U, sigma, Vh = leading_triplets(tau, min(tau.shape))
        total = sigma.double().cumsum(0)
        r = int((total < self.energy * total[-1:]).sum()) + 1
        left, right = r * ("u" in self.space), r * ("v" in self.space)
        return U[:, :left] * sigma[:left], Vh[:right].T * sigma[:right]


def square(P: Float[Tensor, "d r"]) -> Callable[[Tensor], Tensor]:
    r"""E to :math:`P P^\top E`, by the square where that is the cheaper one."""
    if len(P) > 2 * P.shape[1]:
        return lambda E: P @ (P.T @ E)
    S = P @ P.T
    return lambda E: S @ E


def inner(g: Float[Tensor, "m n"], h: Float[Tensor, "m n"]) -> float:
    """The inner product of two matrices."""
    return float((g * h).sum(dtype=torch.float64))


def share_of_first(gg: float, gh: float, hh: float) -> float:
    r""":math:`\arg\min_{a \in [0, 1]} \lVert a g + (1 - a) h \rVert` by inner products; one half where they are equal."""
    length = gg - 2 * gh + hh
    return min(1.0, max(0.0, (hh - gh) / length)) if length > 0 else 0.5

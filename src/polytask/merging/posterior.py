r"""One linear layer as Bayesian regression on what every expert answers to its own inputs, with a prior around an anchor.

All in terms of task vectors: :math:`D_k` of expert k, :math:`D_a` of the anchor, with the bias as one more column where a layer has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch

from polytask.merging.base import in_range
from polytask.merging.moments import rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

JITTER = 1e-8
Gram = Literal["data", "trace", "hybrid"]
"""What stands for an expert's inputs: their second moment, the same with trace 1, or a mixture with the task vector's own."""


@dataclass(frozen=True)
class Posterior:
    r"""The running sums of a layer, from which the merged layer for any strength costs one solve; all float64.

    Attributes:
        S: :math:`\sum_k c_k G_k`.
        R: :math:`\sum_k c_k D_k G_k - D_a S`, how far the anchor is from the experts' answers.
        anchor: :math:`D_a`.
        square: :math:`\sum_k c_k \operatorname{tr}\bigl((D_k - D_a) G_k (D_k - D_a)^\top\bigr)`.
        total: :math:`\sum_k c_k`.
        rows: how many inputs of an expert stand behind its G; 1 where task vectors do.
    """

    S: Float[Tensor, "d d"]
    R: Float[Tensor, "m d"]
    anchor: Float[Tensor, "m d"]
    square: float
    total: float
    rows: float = 1.0

    @classmethod
    def of(
        cls,
        D: Float[Tensor, "experts m d"],
        G: Iterable[Float[Tensor, "d d"]],
        c: Sequence[float],
        anchor: Float[Tensor, "m d"],
        rows: float = 1.0,
    ) -> Self:
        """Add up over experts; of the Gramians one is held at a time."""
        D_a = anchor.double()
        S = torch.zeros(D.shape[2], D.shape[2], dtype=torch.float64)
        R, square = torch.zeros_like(D_a), 0.0
        for D_k, G_k, c_k in zip(D, G, c, strict=True):
            away = D_k.double() - D_a
            answered = away @ G_k
            S.add_(G_k, alpha=c_k)
            R.add_(answered, alpha=c_k)
            square += c_k * float((answered * away).sum())
        return cls(S, R, D_a, square, sum(c), rows)

    def mean(self, strength: float, jitter: float = JITTER) -> Float[Tensor, "m d"]:
        r"""The posterior mean.

        .. math:: D = \Bigl(\sum_k c_k D_k G_k + \lambda s D_a\Bigr) (S + \lambda s I)^{-1} = D_a + R\, (S + \lambda s I)^{-1}, \qquad
            s = \operatorname{tr}(S) / d

        In the second form directions that no input has stay where the anchor has them, also when :math:`\lambda` is no more than jitter.

        Args:
            strength: :math:`\lambda`; 0 is plain regression, infinity the anchor.
            jitter: added to it.
        """
        L = self._factor(strength, jitter)
        if L is None:
            return self.anchor
        fitted: Tensor = torch.cholesky_solve(self.R.T, L).T
        return self.anchor + fitted

    def sample(
        self, strength: float, sigma: float, generator: torch.Generator, jitter: float = JITTER
    ) -> Float[Tensor, "m d"]:
        r"""A draw with rows of covariance :math:`\sigma^2 (S + \lambda s I)^{-1}` around the mean."""
        L = self._factor(strength, jitter)
        if L is None:
            return self.anchor
        Z = torch.randn(self.R.shape, generator=generator, dtype=torch.float64)
        noise: Tensor = torch.linalg.solve_triangular(L, Z, upper=False, left=False)
        return self.mean(strength, jitter) + sigma * noise

    def residual(self, D: Float[Tensor, "m d"]) -> float:
        r"""The root mean square of :math:`(D_k - D) x` over experts, their inputs and outputs: noise of one answer."""
        away = D.double() - self.anchor
        square = self.square - 2 * float((self.R * away).sum()) + float(((away @ self.S) * away).sum())
        return math.sqrt(max(square, 0.0) / (self.total * len(D)))

    def _factor(self, strength: float, jitter: float) -> Tensor | None:
        in_range(strength, "the strength of the anchor", 0, float("inf"))
        s = float(self.S.trace()) / len(self.S)
        if s <= 0:
            return None
        ridge = (strength + jitter) * s
        L: Tensor = torch.linalg.cholesky(self.S + ridge * torch.eye(len(self.S), dtype=torch.float64))
        return L


def second_moments(
    D: Float[Tensor, "experts m d"], statistics: Iterable[Tensor], gram: Gram, *, bias: bool
) -> Iterable[Float[Tensor, "d d"]]:
    r"""What stands for the inputs of each expert, G.

    ``data``: :math:`X^\top X / n`; ``trace``: :math:`X^\top X / \operatorname{tr}`; ``hybrid``: with :math:`\rho = d / (d + n)`,
    :math:`(1 - \rho) X^\top X / \operatorname{tr} + \rho\, D^\top D / \operatorname{tr}`, for few inputs.
    """
    for D_k, S_k in zip(D, statistics, strict=True):
        X = S_k if bias else S_k[:-1, :-1]
        n = rows(S_k)
        if gram == "data":
            yield X / max(n, 1)
        elif gram == "trace":
            yield _of_trace_one(X)
        else:
            rho = len(X) / (len(X) + n)
            yield (1 - rho) * _of_trace_one(X) + rho * own_moment(D_k)


def own_moment(D: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    r""":math:`D^\top D / \operatorname{tr}`: an update is a sum of outer products of gradients and inputs, so that it tells of inputs."""
    exact = D.double()
    return _of_trace_one(exact.T @ exact)


def _of_trace_one(G: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    trace = float(G.trace())
    return G / trace if trace > 0 else torch.zeros_like(G)

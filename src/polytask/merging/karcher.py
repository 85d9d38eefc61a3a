"""The Karcher mean on the sphere (Karcher, 1977; as a merging method in mergekit)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError
from polytask.merging.base import PerExpert, Place, WeightMerger, chunks, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

OPPOSITE = 1e-7
"""Lengths of a mean of unit vectors, and sines, that float32 weights cannot tell from 0."""


@register(
    "karcher",
    family="merging",
    paper="doi:10.1002/cpa.3160300502",
    needs="experts",
    aliases=("karcher_mean",),
    invariances=("permutation", "copies", "scale"),
)
class Karcher(WeightMerger):
    r"""Find the direction with the least mean squared angle to all experts, and give it the mean length.

    .. math:: \mu = \arg\min_{\lVert\mu\rVert = 1} \sum_t w_t \arccos^2 \langle\mu, u_t\rangle, \qquad
        W = \Bigl(\sum_t w_t \lVert W_t\rVert\Bigr)\, \mu, \qquad u_t = W_t / \lVert W_t\rVert

    The mean lies in the span of the :math:`u_t`, so that the whole iteration runs on their T x T Gramian. Experts whose tensor is zero
    have no direction; they count in the mean length. Where directions cancel out, as those of a single number with either sign do, the
    weights themselves are averaged.

    Args:
        weights: :math:`w_t` before they are normalised, positive.
        steps: fixed-point iterations at most.
        tolerance: length of the mean tangent vector at which to stop.

    Cost: one T x T Gramian and one weighted sum of the weights, whatever the number of steps.
    """

    def __init__(self, *, weights: PerExpert = 1.0, steps: int = 100, tolerance: float = 1e-9) -> None:
        in_range(weights, "a weight of karcher", 0, float("inf"), open_low=True, each=True)
        if steps < 1:
            raise InputError(f"karcher takes at least one step, not {steps}")
        self.weights, self.steps, self.tolerance = weights, steps, tolerance

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        rows = W.view(len(W), -1)
        G = torch.zeros(len(W), len(W), dtype=torch.float64)
        for _, piece in chunks(W):
            exact = piece.double()
            G.addmm_(exact, exact.T)
        norms = G.diagonal().sqrt()
        w = torch.tensor(per_expert(self.weights, len(W), "weights"), dtype=torch.float64)
        w /= w.sum()
        kept = norms > 0
        if not kept.any():
            return W[0].zero_()
        c = torch.zeros_like(w)
        unit = norms[kept]
        mean = self._mean(G[kept][:, kept] / unit / unit[:, None], w[kept] / w[kept].sum())
        c[kept] = w[kept] if mean is None else mean / unit * (w @ norms)
        return (c.to(W.dtype) @ rows).view(W.shape[1:])

    def _mean(self, C: Tensor, w: Tensor) -> Tensor | None:
        # coefficients of mu in the unit vectors whose cosines are C; None where they cancel out
        square = w @ C @ w
        if square < OPPOSITE**2:
            return None
        c = w / square.sqrt()
        for _ in range(self.steps):
            cosines = (C @ c).clamp(-1, 1)
            theta = cosines.arccos()
            sine = torch.sinc(theta / torch.pi)
            # every way leads as well to the opposite point: it pulls nowhere
            pull = torch.where(sine > OPPOSITE, w / sine, 0.0)
            tangent = pull - (pull @ cosines) * c
            length = (tangent @ C @ tangent).clamp_min(0).sqrt()
            if length < self.tolerance:
                break
            c = length.cos() * c + length.sin() / length * tangent
            c = c / (c @ C @ c).sqrt()
        return c

"""NuSLERP: spherical interpolation of two models by weights, as whole tensors or vector by vector (Goddard, 2024, in mergekit)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError
from polytask.merging.base import PerExpert, Place, WeightMerger, in_range, per_expert
from polytask.merging.slerp import inner
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

COLLINEAR = 1e-5
"""The sine of the angle below which the arc is the chord."""


@register(
    "nuslerp",
    family="merging",
    paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    needs="experts",
    invariances=("permutation", "copies", "scale"),
)
class NuSlerp(WeightMerger):
    r"""Go from one expert to the other along the arc between them, as far as their weights say.

    .. math:: W = \frac{\sin((1 - t)\,\theta)}{\sin\theta} W_1 + \frac{\sin(t\,\theta)}{\sin\theta} W_2, \qquad
        t = \frac{w_2}{w_1 + w_2}, \quad \cos\theta = \frac{\langle W_1, W_2\rangle}{\lVert W_1\rVert \lVert W_2\rVert}

    Vectors on one line are interpolated linearly; where one of two is zero, :math:`\theta` is a right angle. Weights that sum to 0 mean
    halfway. One expert alone is the result.

    Args:
        weights: :math:`w_t`, one number for both experts or one each.
        flatten: each tensor is one vector; otherwise each has many, with an angle of their own.
        row_wise: those vectors run along the first dimension instead of the last (mergekit's word).
        around_base: the arc is around the base instead of around zero, so that task vectors are interpolated.

    Cost: a few passes over the two models.
    """

    most = 2

    def __init__(
        self,
        *,
        weights: PerExpert = 1.0,
        flatten: bool = True,
        row_wise: bool = False,
        around_base: bool = False,
    ) -> None:
        in_range(weights, "a weight", float("-inf"), float("inf"), each=True)
        self.weights, self.flatten, self.row_wise, self.around_base = weights, flatten, row_wise, around_base

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if not self.around_base:
            return self.combine(W, place)
        if W0 is None:
            raise InputError("nuslerp around the base needs the base that the experts started from")
        return W0.add_(self.combine(W.sub_(W0), place))

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        w = per_expert(self.weights, len(W), "weights")
        if len(W) == 1:
            return W[0]
        t = w[1] / sum(w) if abs(sum(w)) > 1e-6 else 0.5
        a, b = W.view(2, -1) if self.flatten else W
        dim = 0 if self.row_wise and not self.flatten else -1
        norms = (a.norm(dim=dim, keepdim=True) * b.norm(dim=dim, keepdim=True)).double()
        # a product of its own for each vector; a whole tensor's would lose digits in float32
        dot = norms.new_tensor([inner(a, b)]) if self.flatten else torch.linalg.vecdot(a, b, dim=dim).unsqueeze(dim)
        cosine = torch.where(norms > 0, dot / norms, 0.0).clamp(-1, 1)
        theta, sine = cosine.arccos(), (1 - cosine.square()).sqrt()
        first, second = (torch.where(sine > COLLINEAR, (c * theta).sin() / sine, c).to(W.dtype) for c in (1 - t, t))
        merged: Tensor = a.mul_(first).add_(b.mul_(second))
        return merged.view(W.shape[1:])

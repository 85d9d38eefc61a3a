"""Multi-SLERP: barycentric interpolation on the sphere (Goddard, 2025, in mergekit)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.errors import InputError
from polytask.merging.base import PerExpert, Place, WeightMerger, in_range, per_expert
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TINY = 1e-8


@register(
    "multislerp",
    family="merging",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    needs="experts",
    aliases=("multi_slerp",),
    invariances=("permutation", "copies", "scale"),
)
class MultiSlerp(WeightMerger):
    r"""Average directions in the tangent space at their mean, go back to the sphere, and give the result the mean length.

    With :math:`u_t = W_t / \lVert W_t\rVert`, :math:`\mu = \sum_t w_t u_t` scaled to length 1 and weights that sum to 1,

    .. math:: v = \sum_t w_t (u_t - \langle u_t, \mu\rangle \mu), \qquad
        W = \Bigl(\sum_t w_t \lVert W_t\rVert\Bigr) \Bigl(\cos\lVert v\rVert\, \mu + \sin\lVert v\rVert \frac{v}{\lVert v\rVert}\Bigr)

    Directions that cancel out, such as those of a single number with either sign, have no mean: there the weights themselves are averaged.

    Args:
        weights: :math:`w_t`, one number for all experts or one each.
        normalize: divide the weights by their sum.
        around_base: the sphere is around the base instead of around zero, so that task vectors are averaged in this way.

    Cost: a few passes over the weights.
    """

    def __init__(self, *, weights: PerExpert = 1.0, normalize: bool = True, around_base: bool = False) -> None:
        in_range(weights, "a weight", float("-inf"), float("inf"), each=True)
        self.weights, self.normalize, self.around_base = weights, normalize, around_base

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if not self.around_base:
            return self.combine(W, place)
        if W0 is None:
            raise InputError("multislerp around the base needs the base that the experts started from")
        return W0.add_(self.combine(W.sub_(W0), place))

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        w = W.new_tensor(per_expert(self.weights, len(W), "weights"))
        if self.normalize and abs(float(w.sum())) < TINY:
            raise InputError("the weights sum to 0: multislerp needs another sum, or normalize=False")
        if self.normalize:
            w /= w.sum()
        U = W.view(len(W), -1)
        norms = U.norm(dim=1)
        U /= norms.clamp_min(TINY)[:, None]
        mean = w @ U
        length = mean.norm()
        if length < TINY:
            averaged: Tensor = (w * norms) @ U
            return averaged.view(W.shape[1:])
        mean /= length
        # sum_t w_t (u_t - <u_t, m> m) without writing the tangent vectors down
        tangent = w @ U
        tangent.sub_(mean, alpha=float(w @ (U @ mean)))
        angle = tangent.norm()
        merged = mean.mul_(angle.cos()).add_(tangent.mul_(angle.sin() / angle.clamp_min(TINY)))
        return merged.mul_(w @ norms).view(W.shape[1:])

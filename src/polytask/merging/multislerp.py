"""Multi-SLERP: barycentric interpolation on the sphere (Goddard, 2025, in mergekit)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.base import PerExpert, Place, WeightMerger, in_range, per_expert
from polytask.registry import register

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

    Args:
        weights: :math:`w_t` before they are normalised, one number for all experts or one each.

    Cost: a few passes over the weights.
    """

    def __init__(self, *, weights: PerExpert = 1.0) -> None:
        in_range(weights, "a weight", float("-inf"), float("inf"), each=True)
        self.weights = weights

    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        w = W.new_tensor(per_expert(self.weights, len(W), "weights"))
        if abs(float(w.sum())) < TINY:
            raise InputError("the weights sum to 0: multislerp needs another sum")
        w /= w.sum()
        U = W.view(len(W), -1)
        norms = U.norm(dim=1)
        U /= norms.clamp_min(TINY)[:, None]
        mean = w @ U
        length = mean.norm()
        if length < TINY:
            if not norms.any():
                return W[0].zero_()
            raise InputError(f"the experts' directions cancel out in {place.name}: multislerp needs other weights")
        mean /= length
        # sum_t w_t (u_t - <u_t, m> m) without writing the tangent vectors down
        tangent = w @ U
        tangent.sub_(mean, alpha=float(w @ (U @ mean)))
        angle = tangent.norm()
        merged = mean.mul_(angle.cos()).add_(tangent.mul_(angle.sin() / angle.clamp_min(TINY)))
        return merged.mul_(w @ norms).view(W.shape[1:])

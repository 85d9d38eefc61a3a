"""Bayesian model merging without data (Li et al. 2026, arXiv:2605.12843)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from polytask.merging.anchored import AnchoredMerger
from polytask.merging.base import Place
from polytask.merging.posterior import own_moment
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "bmm_data_free",
    family="merging",
    paper="arXiv:2605.12843",
    needs="base",
    aliases=("data_free_bmm",),
    invariances=("permutation", "scale"),
    exempt={"copies": "the anchor adds the task vectors of copies up"},
)
class BMMDataFree(AnchoredMerger):
    r"""Bayesian model merging with task vectors in the place of inputs.

    As :class:`~polytask.merging.bmm.BMM` with :math:`G_k = D_k^\top D_k / \operatorname{tr}(D_k^\top D_k)`: the rows of an update lie in
    the span of the inputs it was trained on. Without an anchor (:math:`\lambda \to 0`) and without biases this is where the descent of
    WUDI ends, in closed form. Matrices are fitted, embeddings included; other tensors take the anchor's value.

    Cost: T products of d x m x d and one Cholesky factorisation of d x d in float64 a matrix of d columns.
    """

    def fits(self, D: Float[Tensor, "experts ..."], place: Place) -> bool:  # noqa: ARG002
        return D.ndim == 3 and 0 not in D.shape

    def moments(self, D: Float[Tensor, "experts m d"], place: Place, *, bias: bool) -> Iterable[Float[Tensor, "d d"]]:  # noqa: ARG002
        return map(own_moment, D)

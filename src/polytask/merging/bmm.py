"""Bayesian model merging (Li et al. 2026, arXiv:2605.12843)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Unpack

from polytask.errors import InputError
from polytask.merging.anchored import AnchoredMerger, AnchorOptions
from polytask.merging.base import Place
from polytask.merging.posterior import Gram, second_moments
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "bmm",
    family="merging",
    paper="arXiv:2605.12843",
    needs="statistics",
    aliases=("bayesian_model_merging", "reforge"),
    invariances=("permutation", "scale"),
    exempt={"copies": "the anchor adds the task vectors of copies up"},
)
class BMM(AnchoredMerger):
    r"""Fit each linear layer to every expert's answers on its own inputs, with a prior around another merge.

    .. math:: W = W_0 + \gamma \Bigl(\sum_k c_k D_k G_k + \lambda s D_a\Bigr) (S + \lambda s I)^{-1}, \qquad S = \sum_k c_k G_k,\quad
        s = \operatorname{tr}(S) / d

    the posterior mean of :math:`Y_k = X_k W_k^\top \sim N(X_k W^\top, \sigma^2)`, :math:`W \sim N(W_a, \tau^2)`,
    :math:`\lambda s = \sigma^2 / \tau^2`, with :math:`G_k = X_k^\top X_k / n_k` from :func:`~polytask.merging.gather_gramians` and
    :math:`D_k = W_k - W_0`. :math:`\lambda \to 0` is RegMean without its shrinkage, :math:`\lambda \to \infty` the anchor.
    Tensors without statistics take the anchor's value.

    Args:
        gram: ``data`` for G as above; ``trace``: of trace 1, so that no expert counts more for larger activations; ``hybrid``: mixed with
            :math:`D_k^\top D_k`, for few inputs.
        options: those of :class:`~polytask.merging.anchored.AnchoredMerger`: ``strength`` is :math:`\lambda`, ``scale`` :math:`\gamma`.

    Cost: one Cholesky factorisation of d x d in float64 a layer of d inputs.
    """

    needs = "statistics"
    statistic = "gramian"

    def __init__(self, *, gram: Gram = "data", **options: Unpack[AnchorOptions]) -> None:
        super().__init__(**options)
        if gram not in ("data", "trace", "hybrid"):
            raise InputError(f"the Gramians of bmm are those of 'data', of 'trace' 1, or a 'hybrid', not {gram!r}")
        self.gram: Gram = gram

    def fits(self, D: Float[Tensor, "experts ..."], place: Place) -> bool:
        return D.ndim == 3 and len(place.statistics) > 0

    def moments(self, D: Float[Tensor, "experts m d"], place: Place, *, bias: bool) -> Iterable[Float[Tensor, "d d"]]:
        return second_moments(D, place.statistics, self.gram, bias=bias)

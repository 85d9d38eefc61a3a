"""TSV-M: task singular vectors, merged (Gargiulo et al., CVPR 2025, arXiv:2412.00081)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from polytask.merging.base import MatrixMerger, Place
from polytask.merging.spectral import in_doubt, leading_triplets, polar_factors
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Factors: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


@register(
    "tsv_m",
    family="merging",
    paper="arXiv:2412.00081",
    needs="base",
    aliases=("tsvm", "task_singular_vectors", "tsv_merge"),
    invariances=("permutation", "scale", "rotation"),
    exempt={"copies": "each expert gets only its share of the rank"},
)
class TSVM(MatrixMerger):
    r"""Give each expert an equal share of the rank, and make the shares orthogonal to one another.

    .. math:: \tau_t \approx U_t S_t V_t^\top \text{ (rank } \lfloor\min(m, n) / T\rfloor), \qquad
        M = \operatorname{polar}[U_1 \cdots U_T]\, \operatorname{diag}(S_1, \dots, S_T)\, \operatorname{polar}[V_1 \cdots V_T]^\top

    Tensors that are not matrices get the mean task vector. Triplets with negligible singular values are left out: their vectors are noise.

    Cost: T eigendecompositions of the smaller side in place of T SVDs, and two of size at most min(m, n); again where experts share
    directions, with full precision.
    """

    # resident memory at its peak over a merge of two to eight: 19 to 20 tensors at 768 x 768, 10 to 11 with one side four times as long
    scratch = 21.0

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:  # noqa: ARG002
        k = min(D.shape[1:]) // len(D) or 1
        left, S, right = self.shares(D, k)
        if in_doubt(left[1]) or in_doubt(right[1]):
            del left, S, right
            left, S, right = self.shares(D, k, exact=True)
        (P, _, Q), (R, _, T) = left, right
        merged: Tensor = torch.linalg.multi_dot([P, Q * S.to(D.dtype), R, T])
        return merged

    def shares(
        self, D: Float[Tensor, "experts m n"], k: int, *, exact: bool = False
    ) -> tuple[Factors, Tensor, Factors]:
        """Both stacks' polar factors and singular values, and S between them."""
        m, n = D.shape[1:]
        # many shares side by side are ill-conditioned, in float64 until they are orthogonal; on a far longer side they are not
        left, right = (D.dtype if long >= 2 * short else torch.float64 for long, short in ((m, n), (n, m)))
        triplets = []
        for tau in D:
            U, s, Vh = leading_triplets(tau, k, torch.float64, exact=exact)
            triplets.append((U.to(left), s, Vh.to(right)))
        U, s, Vh = (torch.cat([t[i] for t in triplets], dim=d) for i, d in ((0, 1), (1, 0), (2, 0)))
        del triplets
        return polar_factors(U, D.dtype), s, polar_factors(Vh, D.dtype)

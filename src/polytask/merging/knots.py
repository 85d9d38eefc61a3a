"""KnOTS: merging in the singular vectors that the task vectors share (Stoica et al., ICLR 2025, arXiv:2410.19735)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

import torch

from polytask.errors import InputError
from polytask.merging.base import MatrixMerger, Place, TaskVectorOptions
from polytask.merging.inner import inner_merger
from polytask.merging.spectral import NEGLIGIBLE, leading_pairs
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "knots",
    family="merging",
    paper="arXiv:2410.19735",
    needs="base",
    aliases=("KnOTS", "knots_ties"),
    invariances=("permutation", "scale"),
    exempt={"copies": "the inner method trims the aligned entries for good"},
)
class KnOTS(MatrixMerger):
    r"""Turn the task vectors to one common basis of outputs, merge what remains of each there, and turn back.

    .. math:: [\tau_1 \cdots \tau_T] = U \operatorname{diag}(\sigma)\, [V_1^\top \cdots V_T^\top], \qquad
        M = U \operatorname{diag}(\sigma)\, m(V_1^\top, \dots, V_T^\top)

    Made for LoRA experts, whose updates meet in few entries but in the same directions. For an inner method that is linear, such as task
    arithmetic, nothing changes. Tensors that are not matrices get the mean task vector.

    Args:
        inner: m, any merger of task vectors; TIES in the paper's best rows.
        inner_options: its options.
        space: what is merged: ``V``, or ``SV``, in which directions keep their size, so that trimming spares the large ones.

    Cost: a Gramian and an eigendecomposition of the output side, two products with every task vector, the inner method's.
    """

    scratch = 3.0

    def __init__(
        self,
        *,
        inner: str = "ties",
        inner_options: dict[str, object] | None = None,
        space: Literal["V", "SV"] = "V",
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        if space not in ("V", "SV"):
            raise InputError(f"knots merges in the space 'V' or 'SV', not {space!r}")
        self.inner, self.space = inner_merger(self, inner, inner_options), space

    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:
        G = torch.zeros(D.shape[1], D.shape[1], dtype=torch.float64)
        for tau in D:
            wide = tau.double()
            G.addmm_(wide, wide.T)
        squares, U = leading_pairs(G, len(G))
        sigma = squares.clamp_min(0).sqrt()
        kept = sigma > NEGLIGIBLE * sigma[0]
        if not kept.any():
            return torch.zeros_like(W0)
        basis, sigma = U[:, kept].to(D.dtype), sigma[kept].to(D.dtype)
        size = sigma if self.space == "V" else torch.ones_like(sigma)
        V = D.new_empty(len(D), len(sigma), D.shape[2])
        for row, tau in zip(V, D, strict=True):
            torch.mm((basis / size).T, tau, out=row)
        return (basis * size) @ self.inner.update(V.new_zeros(V.shape[1:]), V, place)

"""F-MTL: task-based flat regions (Phan, Tran, Tran, Ho, Phung and Le, 2022, arXiv:2211.13723)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from polytask.balancing.base import BaseOptions
from polytask.balancing.looks import Looks
from polytask.balancing.sharpness import SharpnessAware
from polytask.registry import register


@register(
    "f_mtl",
    family="balancing",
    paper="arXiv:2211.13723",
    needs="second evaluation",
    aliases=("FS_MTL", "flat_mtl", "sam_mtl"),
    invariances=("permutation", "scale"),
)
class FMTL(SharpnessAware):
    r"""Look for regions that are flat for every task, by any method of combining gradients.

    .. math:: g_i^{SAM} = \nabla L_i\Bigl(\theta + \rho \frac{g_i}{\lVert g_i \rVert}\Bigr), \qquad
        d = A(g_1, \dots, g_K) + A(g_1^{SAM} - g_1, \dots, g_K^{SAM} - g_K)

    with A the inner method, which balances the way downhill and the way to flatness apart. Shared parameters and those of the task are
    moved by :math:`\rho` each; those of single tasks get :math:`g^{SAM}` of their loss. :math:`\rho \to 0` is the inner method, where its
    direction grows with its gradients; one that normalises them makes a full direction of the second term however small, and wants
    ``apart=False``.

    Args:
        inner: A, by name.
        inner_options: its options.
        rho: :math:`\rho`.
        apart: whether the two parts are combined apart, as in the paper; if not, :math:`d = A(g_1^{SAM}, \dots, g_K^{SAM})`.

    Cost: 1 + K forward and 2 K backward passes, 2 K x P numbers.
    """

    def __init__(
        self,
        *,
        inner: str = "cagrad",
        inner_options: Mapping[str, Any] | None = None,
        rho: float = 0.05,
        apart: bool = True,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(inner, inner_options, rho, 2 if apart else 1, **base)
        self.apart = apart

    def look(self, looks: Looks) -> tuple[Tensor, Tensor | None]:
        n = looks.n_shared
        G = looks.rows(0)
        S = self.uphill(looks, G)
        if self.apart:
            d = self.combined(self.inners[0], G[:, :n], looks) + self.combined(self.inners[1], (S - G)[:, :n], looks)
        else:
            d = self.combined(self.inners[0], S[:, :n], looks)
        return self.outcome(looks, d, S[:, n:].sum(0))

"""Aligned-MTL: independent component alignment (Senushkin et al., CVPR 2023, arXiv:2305.19000)."""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.registry import register


@register(
    "aligned_mtl",
    family="balancing",
    paper="arXiv:2305.19000",
    needs="gramian",
    aliases=("AlignedMTL_UB",),
    invariances=("permutation", "scale", "single"),
)
class AlignedMTL(GramianWeighting):
    r"""Give the task-gradient matrix equal singular values, then add its rows.

    With the Gramian :math:`C = V \Lambda V^\top` of rank r,

    .. math:: w = \sqrt{\lambda}\; V_r \Lambda_r^{-1/2} V_r^\top p

    where :math:`\lambda` is the least, median (of two in the middle the smaller, as in the authors' code) or mean of
    :math:`\Lambda_r`. Eigenvalues below the rounding of the largest count as zero: in single precision, what only gradients a
    thousand times shorter than the rest could tell is lost, so mind the scales of the losses.

    Args:
        scale: which eigenvalue all are made equal to: ``min``, ``median`` or ``rmse`` (their mean).
        average: divide by K, as TorchJD does; the authors' code and LibMTL add.

    Cost: one K x K eigendecomposition a step. Equal weighting for orthogonal gradients of equal norm.
    """

    def __init__(
        self, *, scale: Literal["min", "median", "rmse"] = "min", average: bool = False, **base: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**base)
        if scale not in ("min", "median", "rmse"):
            raise InputError(f"aligned_mtl scales to 'min', 'median' or 'rmse', not {scale!r}")
        self.scale, self.average = scale, average

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        eigenvalues, vectors = np.linalg.eigh(C)
        kept = eigenvalues > len(C) * self.precision * eigenvalues[-1]
        V, lam = vectors[:, kept], eigenvalues[kept]
        common = {"min": lam[0], "median": lam[(len(lam) - 1) // 2], "rmse": lam.mean()}[self.scale]
        w = (V * np.sqrt(common / lam)) @ (V.T @ self.p)
        return np.asarray(w / len(C) if self.average else w)

"""Prototypes of experts that need no data: the direction of the input that an update answers most (Arrow, arXiv:2405.11157)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.merging.routed import LowRank


def arrow_prototypes(low: LowRank) -> Float[Tensor, "experts inputs"]:
    r"""The first right singular vector of each expert's update :math:`B A`, of unit length; its sign means nothing.

    .. math:: A^\top = Q_a R_a,\quad B = Q_b R_b,\quad R_b R_a^\top = U S V^\top,\quad v = Q_a V_{\cdot 1}

    The updates are never formed. Other factors of the same update, (G A, B G^-1), give the same.

    Cost: 2 (inputs + outputs) rank^2 multiplications an expert.
    """
    Q, R_a = torch.linalg.qr(low.A.double().mT)
    R_b = torch.linalg.qr(low.B.double()).R
    V = torch.linalg.svd(R_b @ R_a.mT).Vh[:, 0]
    return torch.einsum("kir,kr->ki", Q, V).to(low.A.dtype)

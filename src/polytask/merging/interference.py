"""How task vectors stand to one another, before anything is merged: angles, opposed signs, shared subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.base import chunks
from polytask.merging.in_memory import specs
from polytask.merging.matching import match
from polytask.merging.spectral import leading_pairs, small_gramian


@dataclass(frozen=True)
class Interference:
    """What is known of T task vectors.

    Attributes:
        names: of the experts.
        norm: length of each task vector, shape (T,).
        cosine: between two of them, shape (T, T).
        opposed: share of the entries that both move in which they move apart, shape (T, T); 0.5 for unrelated ones.
        overlap: how much of the leading directions of one lies in those of the other, mean over matrices, shape (T, T), from 0 to 1.
        chance: the overlap of random subspaces of the same dimensions.
    """

    names: tuple[str, ...]
    norm: Float[Tensor, " experts"]
    cosine: Float[Tensor, "experts experts"]
    opposed: Float[Tensor, "experts experts"]
    overlap: Float[Tensor, "experts experts"]
    chance: float


@torch.no_grad()
def interference(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], skip: Sequence[str] = ()
) -> Interference:
    r"""Compare task vectors :math:`\tau_t = W_t - W_0` with one another.

    .. math:: \cos_{ij} = \frac{\langle \tau_i, \tau_j \rangle}{\lVert\tau_i\rVert \lVert\tau_j\rVert}, \qquad
        \mathrm{overlap}_{ij} = \operatorname{mean}_{\text{matrices}} \tfrac1k \lVert U_i^\top U_j \rVert_F^2,

    with U the k leading singular vectors on a matrix's smaller side, k that side's T-th part: the share of rank that TSV-M gives an expert.

    Args:
        base: the state dict that the experts started from.
        experts: by name.
        skip: patterns of tensors that are left out, such as task heads.

    Raises:
        InputError: models that do not fit together.

    Cost: one pass over the weights, and for every matrix and expert an eigendecomposition of the smaller side.
    """
    named = [("the base", base), *experts.items()]
    merged = match([(label, specs(s, label)) for label, s in named], skip).merged
    T = len(experts)
    if not T:
        raise InputError("there is nothing to compare: no expert was given")
    gramian, together, apart, overlap = (torch.zeros(T, T, dtype=torch.float64) for _ in range(4))
    ranks: list[float] = []
    for name in merged:
        W0 = base[name].detach().to("cpu", torch.float32)
        D = torch.stack([s[name].detach().to("cpu", torch.float32) - W0 for s in experts.values()])
        for _, piece in chunks(D):
            gramian += piece.double() @ piece.double().T
            signs = piece.sign().double()
            both, sum_of_products = signs.abs() @ signs.abs().T, signs @ signs.T
            together += both
            apart += (both - sum_of_products) / 2
        # a convolution's kernel is a matrix from patches to channels
        M = D.flatten(2) if D.ndim > 2 else D
        if M.ndim == 3 and min(M.shape[1:]) >= T:
            shared, k = _overlap(M)
            overlap += shared
            ranks.append(k / min(M.shape[1:]))
    norm = gramian.diagonal().sqrt()
    return Interference(
        tuple(experts),
        norm,
        gramian / (norm[:, None] * norm).clamp_min(torch.finfo(torch.float64).tiny),
        apart / together.clamp_min(1),
        overlap / max(1, len(ranks)),
        sum(ranks) / max(1, len(ranks)),
    )


def _overlap(D: Float[Tensor, "experts m n"]) -> tuple[Float[Tensor, "experts experts"], int]:
    T, k = len(D), min(D.shape[1:]) // len(D)
    U = torch.stack([leading_pairs(small_gramian(d), k)[1] for d in D])
    cosines = torch.einsum("imk,jml->ijkl", U, U)
    return cosines.square().sum((2, 3)).reshape(T, T) / k, k

"""BitDelta: experts of one bit an entry (Liu et al., NeurIPS 2024, arXiv:2402.10193)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from polytask.merging.base import Place, as_patterns
from polytask.merging.masking import KeptApart
from polytask.merging.matching import skipped
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@register(
    "bitdelta",
    family="merging",
    paper="arXiv:2402.10193",
    needs="base",
    aliases=("BitDelta", "one_bit_delta"),
    invariances=("scale",),
    exempt={
        "permutation": "the model of one expert, told by its position",
        "copies": "of the entries of a matrix only the sign is kept",
        "integers_are_the_base_s": "what is not merged is the expert's own",
    },
    example={"expert": 0},
)
class BitDelta(KeptApart):
    r"""Keep of each matrix of an expert the signs of its task vector and their mean size; everything else is the expert's own.

    .. math:: \hat\tau_t = \alpha_t \operatorname{Sign}(\tau_t), \qquad \alpha_t = \frac1{mn} \sum |\tau_t|, \qquad
        \operatorname{Sign}(x) = \begin{cases} +1 & x \ge 0 \\ -1 & x < 0 \end{cases}

    No other :math:`\alpha_t` is nearer to :math:`\tau_t`. Experts share nothing but the base. The paper then distils the :math:`\alpha_t`
    on text, which is not done here.

    Args:
        layers: patterns of the matrices of which bits are kept; the paper takes the linear layers within the blocks, not embeddings.
        expert: whose model is unpacked, by name or position; :func:`~polytask.merging.pack` keeps all of them.

    Cost: two passes over one expert's task vector; one bit an entry and one number a matrix for each expert.
    """

    scratch = 3.0

    def __init__(self, *, layers: str | Sequence[str] = "*", expert: int | None = None) -> None:
        super().__init__(expert=expert)
        self.layers = as_patterns(layers)

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        assert self.expert is not None
        tau = D[self.expert]
        return signed(tau >= 0, size(tau), tau.dtype) if self.takes(place.name, tau.ndim) else tau

    def takes(self, name: str, axes: int) -> bool:
        """Whether bits are kept of a tensor with so many axes."""
        return axes == 2 and skipped(name, self.layers)


def size(tau: Float[Tensor, "m n"]) -> float:
    r""":math:`\alpha`."""
    return float(tau.abs().mean(dtype=torch.float64)) if tau.numel() else 0.0


def signed(positive: Bool[Tensor, "m n"], alpha: float, dtype: torch.dtype) -> Float[Tensor, "m n"]:
    r""":math:`\alpha` where a bit is set, :math:`-\alpha` elsewhere."""
    return positive.to(dtype).mul_(2).sub_(1).mul_(alpha)

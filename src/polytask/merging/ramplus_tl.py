"""Reinforced agent merging that enlarges what one expert alone changed (Yuan et al., 2026, arXiv:2601.13572; by tensors: mergekit)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from polytask.merging.base import TaskVectorOptions, chunks, in_range
from polytask.merging.ram import RAM
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "ramplus_tl",
    family="merging",
    paper="arXiv:2601.13572",
    needs="base",
    aliases=("ram_plus",),
    invariances=("permutation",),
    exempt={
        "copies": "entries that moved by less than epsilon go back to the base",
        "scale": "epsilon, beyond which an entry counts as changed, is an absolute number",
    },
)
class RAMPlus(RAM):
    r"""Average each entry over the experts that changed it, and enlarge those that one expert alone changed.

    .. math:: M = \frac{\sum_t w_t \lambda_t^{[c = 1]} \tau_t\, m_t}{\max(1, c)}, \qquad m_t = [\,|\tau_t| > \epsilon\,], \quad
        c = \sum_t m_t

    .. math:: \lambda_t = 1 + r \min\Bigl(\alpha, \frac{\#\{m_t, c > 1\}}{\#\{m_t, c = 1\}}\Bigr)

    elementwise, with entries counted within each tensor: the more of its changes an expert shares, and thus has averaged down, the more
    weight have its own.

    Args:
        r: how much the ratio counts.
        alpha: :math:`\alpha`, the ratio that counts at most.
        epsilon: :math:`\epsilon`, up to which an entry counts as unchanged.

    Cost: two passes over the task vectors.
    """

    def __init__(
        self, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5, **base: Unpack[TaskVectorOptions]
    ) -> None:
        super().__init__(epsilon=epsilon, **base)
        in_range(r, "r of ramplus_tl", 0, float("inf"))
        in_range(alpha, "alpha of ramplus_tl", 0, float("inf"))
        self.r, self.alpha = r, alpha

    def emphasis(self, D: Float[Tensor, "experts ..."]) -> Float[Tensor, "experts 1"]:
        shared, alone = D.new_zeros(2, len(D)).long()
        for _, d in chunks(D):
            m = d.abs() > self.epsilon
            c = m.sum(0)
            shared += (m & (c > 1)).sum(1)
            alone += (m & (c == 1)).sum(1)
        rho: Tensor = shared / alone.clamp_min(1)
        return (1 + self.r * rho.clamp_max(self.alpha)).to(D.dtype)[:, None]

"""Adding task vectors up after each was made sparse, with or without an election of signs: the family of TIES, DARE, DELLA, Breadcrumbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from polytask.merging.base import Filter, Place, TaskVectorMerger, chunks, per_expert

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SparseMerger(TaskVectorMerger):
    r"""A filter that makes each task vector sparse, then their weighted sum, mean, or sum of the elected sign.

    .. math:: s = \operatorname{sign}\Bigl(\sum_t w_t \tau'_t\Bigr), \qquad
        M = \frac{\sum_t w_t \tau'_t \, [w_t \tau'_t s > 0]}{\sum_t w_t [w_t \tau'_t s > 0]}

    elementwise; without an election every bracket is 1, without normalisation the denominator is 1.

    A method sets the attributes.

    Attributes:
        sparsify: the filter.
        elect: let only the entries of the majority's sign take part.
        normalize: divide by the weights that took part; where they sum to 0, by 1.
    """

    weighs_itself = True
    elect: ClassVar[bool]
    sparsify: Filter
    normalize: bool

    @property
    def passes(self) -> int:  # type: ignore[override]
        """As many as the filter's."""
        return self.sparsify.passes

    def begin(self) -> None:
        self.sparsify.begin()

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:
        self.sparsify.survey(W0, D, place)

    def end_pass(self) -> None:
        self.sparsify.end_pass()

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        D = self.sparsify.apply(W0, D, place)
        w = D.new_tensor(per_expert(self.weights, len(D), "weights"))
        return add_up(D, w, elect=self.elect, normalize=self.normalize)


def add_up(
    D: Float[Tensor, "experts ..."], w: Float[Tensor, " experts"], *, elect: bool, normalize: bool
) -> Float[Tensor, "..."]:
    """The weighted sum of rows, of those entries alone that have the sum's sign where ``elect``; see :class:`SparseMerger`."""
    merged = torch.empty_like(D[0])
    out, column = merged.view(-1), w[:, None]
    for where, d in chunks(D):
        weighted = d * column
        total = weighted.sum(0)
        divisor = w.sum()
        if elect:
            agrees = torch.where(total >= 0, weighted, -weighted) > 0
            total = weighted.mul_(agrees).sum(0)
            divisor = (agrees * column).sum(0)
        if normalize:
            total /= torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        out[where] = total
    return merged

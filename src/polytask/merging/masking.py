"""What is common to methods that keep experts apart, by a mask or by other bits of each."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from polytask.errors import InputError
from polytask.merging.base import Place, TaskVectorMerger, chunks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class KeptApart(TaskVectorMerger):
    r"""A merger that gives the model of one expert as it comes out of what :func:`~polytask.merging.pack` keeps of all.

    Args:
        expert: whose model.
    """

    def __init__(self, *, expert: int | None = None) -> None:
        super().__init__()
        self.keeps = self.expert = expert

    def check_experts(self, count: int) -> None:
        super().check_experts(count)
        if self.expert is None:
            raise InputError(
                f"{self.method.name} keeps experts apart: say whose model is wanted, expert=NAME; polytask.merging.pack keeps all"
            )
        if not isinstance(self.expert, int) or not 0 <= self.expert < count:
            raise InputError(f"there is no expert {self.expert!r} among {count}")


class Masking(KeptApart):
    r"""A rule that makes one task vector of several, and says which of its entries each expert uses.

    As a merger it gives the model of one expert, :math:`W_0 + \lambda_t\, m_t \odot \tau`.

    Attributes:
        rescaled: whether an expert's part is stretched to the mean magnitude of its own task vector.

    Args:
        expert: t.
    """

    rescaled: ClassVar[bool]

    def __init__(self, *, expert: int | None = None) -> None:
        super().__init__(expert=expert)
        self.passes = int(self.rescaled)
        self.begin()

    def begin(self) -> None:
        self.own, self.part = 0.0, 0.0

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:  # noqa: ARG002
        assert self.expert is not None
        for _, d in chunks(D):
            tau, m = self.unify(d)
            self.own += float(d[self.expert].abs().sum(dtype=torch.float64))
            self.part += float((m[self.expert] * tau).abs().sum(dtype=torch.float64))

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        assert self.expert is not None
        lam = self.own / self.part if self.part > 0 else 1.0
        merged = torch.empty_like(D[0])
        for where, d in chunks(D):
            tau, m = self.unify(d)
            merged.view(-1)[where] = lam * m[self.expert] * tau
        return merged

    @abstractmethod
    def unify(self, D: Float[Tensor, "experts ..."]) -> tuple[Float[Tensor, "..."], Bool[Tensor, "experts ..."]]:
        """The common task vector and each expert's mask, of one tensor; D may not be changed."""

"""Rare tasks weighted by how rare they are, up to a cap (Dishi et al., RecSys 2025, arXiv:2507.20161)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting, Vector
from polytask.errors import InputError
from polytask.registry import register


@register(
    "capped_frequency",
    family="balancing",
    paper="arXiv:2507.20161",
    needs="losses",
    aliases=("rare_conversions",),
    invariances=("permutation", "scale", "single"),
)
class CappedFrequency(LossWeighting):
    r"""Multiply the loss of a task with few examples by how much fewer they are than the most frequent task's, up to a cap.

    .. math:: L = \sum_i p_i w_i L_i, \qquad w_i = \min\Bigl(\omega,\; \frac{\max_j N_j}{N_i}\Bigr)

    For tasks that divide the examples between them, each belonging to one, :math:`L_i` is the **sum** over the task's examples divided
    by the size of the whole batch. The paper does not print its weights; this default is the one proposed for it.

    Args:
        counts: :math:`N_i`, training examples of each task, by position or by name; equal ones when omitted.
        cap: :math:`\omega`.

    Cost: nothing beyond the sum.
    """

    def __init__(
        self,
        *,
        counts: Mapping[str, int] | Sequence[int] | None = None,
        cap: float = 10.0,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        numbers = list(counts.values() if isinstance(counts, Mapping) else counts or ())
        if not cap >= 1 or any(not n > 0 for n in numbers):
            raise InputError(f"capped_frequency takes counts above 0 and a cap of at least 1, not {numbers} and {cap}")
        self.counts, self.cap = counts, cap

    def bind(self, tasks: Sequence[str]) -> None:
        super().bind(tasks)
        if self.counts is not None and len(self.counts) != len(self.tasks or ()):
            raise InputError(f"capped_frequency was given {len(self.counts)} counts for {len(self.tasks or ())} tasks")
        missing = [t for t in self.tasks or () if isinstance(self.counts, Mapping) and t not in self.counts]
        if missing:
            raise InputError(f"capped_frequency was given no count for the task {missing[0]!r}")

    @property
    def task_weights(self) -> Vector:
        """:math:`w_i` of the tasks of the current call, shape (active,)."""
        if self.counts is None:
            return np.ones(len(self.active))
        names = self.tasks or ()
        N = np.array(
            [self.counts[t] if isinstance(self.counts, Mapping) else self.counts[i] for i, t in enumerate(names)]
        )
        return np.asarray(np.minimum(self.cap, N.max() / N)[self.active])

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        w = losses.new_tensor(self.p * self.task_weights)
        return (w * losses).sum(), w

"""Second moments of several objectives' gradients and of their products, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError

Cross = Literal["full", "diag", "sampled"]


class PairMoments:
    r"""Running means of products of gradients, from which the second moment of any weighted sum of them follows.

    .. math::
        F_{ij} \leftarrow \beta_2 F_{ij} + (1 - \beta_2)\, g_i \odot g_j, \qquad
        C_\lambda = \sum_{i,j} \lambda_i \lambda_j \hat F_{ij}, \quad \hat F_{ij} = F_{ij} / (1 - \beta_2^{n_{ij}})

    with :math:`n_{ij}` the number of updates of that pair. Where all pairs are updated together :math:`C_\lambda` is a mean of squares,
    at least 0 for any :math:`\lambda`; rounding and pairs updated at different times are held above a small share of
    :math:`\sum_i \lambda_i^2 \hat F_{ii}`.

    Args:
        tasks: K, the number of objectives.
        like: P parameters' worth of memory is laid out like this tensor of shape (P,).
        beta2: :math:`\beta_2`, in [0, 1).
        cross: ``full`` and ``sampled`` keep K (K + 1) / 2 x P numbers, ``diag`` keeps K x P and leaves i != j out of the sum.
    """

    def __init__(self, tasks: int, like: Float[Tensor, " coordinates"], beta2: float, cross: Cross) -> None:
        last = (lambda i: i + 1) if cross == "diag" else (lambda _: tasks)
        self.pairs = [(i, j) for i in range(tasks) for j in range(i, last(i))]
        self.F = like.new_zeros(len(self.pairs), len(like))
        self.counts = [0] * len(self.pairs)
        self.beta2 = beta2
        # a sum over pairs that were not updated together may come out negative, and must not turn into a huge step
        self.floor = 1e-3 if cross == "sampled" else torch.finfo(like.dtype).eps

    def unknown(self, tasks: Collection[int]) -> bool:
        """Whether some pair of these tasks was never updated."""
        return any(n == 0 and i in tasks and j in tasks for (i, j), n in zip(self.pairs, self.counts, strict=True))

    def update(self, rows: Mapping[int, Float[Tensor, " coordinates"]]) -> None:
        """Take in one gradient of each of some tasks: {task: g}; all pairs among them move on."""
        for m, (i, j) in enumerate(self.pairs):
            if i in rows and j in rows:
                self.F[m].mul_(self.beta2).addcmul_(rows[i], rows[j], value=1 - self.beta2)
                self.counts[m] += 1

    def second_moment(self, weights: Float[Tensor, " tasks"]) -> Float[Tensor, " coordinates"]:
        """C of these weights, shape (coordinates,); weights of tasks never seen must be 0. Cost: one pass over F."""
        lam = weights.tolist()
        coefficients, own = [], []
        for (i, j), n in zip(self.pairs, self.counts, strict=True):
            c = lam[i] * lam[j] / (1 - self.beta2**n) if n else 0.0
            coefficients.append(c if i == j else 2 * c)
            own.append(c if i == j else 0.0)
        C, diagonal = self.F.new_tensor([coefficients, own]) @ self.F
        return torch.maximum(C, self.floor * diagonal)

    def state_dict(self) -> dict[str, Any]:
        """F and how often each pair was updated."""
        return {"F": self.F.clone(), "counts": list(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: it was taken with other tasks, parameters or ``cross``.
        """
        if state["F"].shape != self.F.shape:
            raise InputError(
                f"the optimizer's state holds moments of shape {tuple(state['F'].shape)} and needs {tuple(self.F.shape)}"
            )
        self.F.copy_(state["F"])
        self.counts = list(state["counts"])

"""PACT: preserving anchored cores in task vectors (Shi et al. 2026, arXiv:2606.18627)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from polytask.errors import InputError
from polytask.merging.base import Filter, Place, as_patterns, in_range
from polytask.merging.matching import skipped
from polytask.merging.subspaces import EMPTY, TOLERANCE, orthonormal, rank_for_energy, right_basis, without
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FULL = 0.9
"""Share of the input space beyond which a protected space leaves nothing worth merging."""

Orth: TypeAlias = "Callable[[Tensor], Tensor]"
"""Gives an orthonormal basis of what a matrix's columns span."""


@register(
    "pact",
    family="filter",
    paper="arXiv:2606.18627",
    needs="base",
    aliases=("anchored_cores",),
    invariances=("permutation", "scale"),
    exempt={"copies": "each copy is kept off what the other copies rely on"},
    example={"core_ratio": 0.2, "task_rank": 3},
)
class PACT(Filter):
    r"""Keep each task vector off the pre-trained directions that other experts rely on without having changed them.

    With :math:`V_0` the K leading right singular vectors of :math:`W_0` and :math:`V_t` the k leading ones of :math:`\tau_t`,

    .. math:: R_t = \operatorname{orth}(V_0 - V_t V_t^\top V_0), \qquad P_j = \operatorname{orth}[R_t]_{t \ne j}, \qquad
        \tau_j' = \tau_j (I - P_j P_j^\top)

    Tensors that are not matrices pass unchanged. The defaults are those of the paper's analysis; the ratio that its code ships, 0.8, leaves
    nothing of three or more experts and is refused.

    Args:
        core_ratio: K as a part of the smaller side.
        task_rank: k.
        ranks: ``fixed`` as above; ``adaptive``: the least ranks that hold ``core_energy`` and ``task_energy``.
        core_energy: share of :math:`\|W_0\|_F^2` that adaptive K holds.
        task_energy: share of :math:`\|\tau_t\|_F^2` that adaptive k holds.
        orth: ``svd`` leaves out directions below the tolerance; ``qr`` keeps all columns, as the published code does, and so removes noise.
        tolerance: of ``svd``, relative to the largest singular value.
        svd: ``exact``, or ``randomized`` with two power iterations.
        layer_ratio: the part of the matrices, from the first to the last in the model, that is filtered.
        include: patterns of the tensors that are filtered.
        exclude: patterns of tensors that are not.

    Raises:
        InputError: at a tensor where more than nine tenths of the input space would be protected.

    Cost: an eigendecomposition of the smaller side for the base and each expert, and T SVDs of (inputs, (T - 1) K).
    """

    scratch = 3.0

    def __init__(
        self,
        *,
        core_ratio: float = 0.05,
        task_rank: int = 32,
        ranks: Literal["fixed", "adaptive"] = "fixed",
        core_energy: float = 0.85,
        task_energy: float = 0.95,
        orth: Literal["svd", "qr"] = "svd",
        tolerance: float = TOLERANCE,
        svd: Literal["exact", "randomized"] = "exact",
        layer_ratio: float = 1.0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("*text_projection*",),
    ) -> None:
        for value, name in ((core_ratio, "core_ratio"), (core_energy, "core_energy"), (task_energy, "task_energy")):
            in_range(value, f"{name} of pact", 0, 1)
        in_range(task_rank, "task_rank of pact", 0, float("inf"))
        in_range(tolerance, "the tolerance of pact", 0, 1)
        in_range(layer_ratio, "layer_ratio of pact", 0, 1)
        for choice, known in ((ranks, ("fixed", "adaptive")), (orth, ("svd", "qr")), (svd, ("exact", "randomized"))):
            if choice not in known:
                raise InputError(f"pact takes {known[0]!r} or {known[1]!r}, not {choice!r}")
        self.core_ratio, self.task_rank, self.adaptive = core_ratio, int(task_rank), ranks == "adaptive"
        self.core_energy, self.task_energy = core_energy, task_energy
        self.orth: Orth = _all_columns if orth == "qr" else partial(orthonormal, tolerance=tolerance)
        self.randomized, self.layer_ratio = svd == "randomized", layer_ratio
        self.include, self.exclude = as_patterns(include), as_patterns(exclude)
        self.passes = int(layer_ratio < 1)
        self.matrices: list[str] = []

    def begin(self) -> None:
        self.matrices = []

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:  # noqa: ARG002
        if self._chosen(W0, place.name):
            self.matrices.append(place.name)

    def end_pass(self) -> None:
        self.matrices = self.matrices[: int(self.layer_ratio * len(self.matrices))]

    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if not self._chosen(W0, place.name) or (self.passes and place.name not in self.matrices):
            return D
        for tau, P in zip(D, self.protected(W0, D, place), strict=True):
            tau.copy_(without(tau, P))
        return D

    def apply_to_adapters(
        self, W0: Float[Tensor, "m n"], A: Sequence[Float[Tensor, "r n"]], place: Place
    ) -> list[Float[Tensor, "r n"]]:
        r"""The same on LoRA adapters :math:`\tau_t = B_t A_t`: the inner factors :math:`A_t (I - P_t P_t^\top)`, whose outer ones stay.

        A task's own directions are those that its :math:`A_t` reads, as long as ``task_rank`` is no less than the adapter's rank.
        """
        return [without(a, P) for a, P in zip(A, self.protected(W0, A, place), strict=True)]

    def protected(
        self, W0: Float[Tensor, "m n"], D: Sequence[Tensor] | Tensor, place: Place
    ) -> list[Float[Tensor, "n r"]]:
        """For each expert the space :math:`P_j` that the others rely on.

        Raises:
            InputError: it is nearly the whole input space.
        """
        rely = self.reliance(W0, D, place)
        found = [
            self.orth(torch.cat([R for t, R in enumerate(rely) if t != j] or [W0[:0].T.double()], 1))
            for j in range(len(rely))
        ]
        for j, P in enumerate(found):
            if P.shape[1] > FULL * len(P):
                raise InputError(
                    f"pact would keep expert {j + 1} off {P.shape[1]} of the {len(P)} input directions of {place.name}, which leaves "
                    "nothing worth merging of its update: take a smaller core_ratio (0.05 in the paper's analysis)"
                )
        return found

    def reliance(
        self, W0: Float[Tensor, "m n"], D: Sequence[Tensor] | Tensor, place: Place
    ) -> list[Float[Tensor, "n r"]]:
        """The directions :math:`R_t` that each expert relies on and did not change."""
        K = rank_for_energy(W0, self.core_energy) if self.adaptive else int(self.core_ratio * min(W0.shape))
        V0 = right_basis(W0, K, place.generator() if self.randomized else None)
        found = []
        for t, tau in enumerate(D):
            k = rank_for_energy(tau, self.task_energy) if self.adaptive else self.task_rank
            V = right_basis(tau, k, place.generator(t + 1) if self.randomized else None)
            found.append(reliance_space(V0, V, self.orth))
        return found

    def _chosen(self, W0: Tensor, name: str) -> bool:
        return W0.ndim == 2 and W0.numel() > 0 and skipped(name, self.include) and not skipped(name, self.exclude)


def reliance_space(
    V0: Float[Tensor, "n K"], V: Float[Tensor, "n k"], basis: Orth = orthonormal
) -> Float[Tensor, "n r"]:
    """What of the core :math:`V_0` a task relies on without having rewritten it: the rest of it outside V."""
    residual = V0 - V @ (V.T @ V0)
    return basis(residual) if float(residual.norm()) >= EMPTY else residual[:, :0]


def _all_columns(A: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    Q: Tensor = torch.linalg.qr(A)[0]
    return Q


def similarity(R: Float[Tensor, "n a"], Q: Float[Tensor, "n b"]) -> float:
    r"""How far two tasks rely on the same directions: :math:`\|R^\top Q\|_F^2 / \min(a, b)`, between 0 and 1."""
    return float((R.T @ Q).square().sum()) / max(min(R.shape[1], Q.shape[1]), 1)


def hidden_interference(V: Float[Tensor, "n k"], R: Float[Tensor, "n r"]) -> float:
    r"""How much of what one task rewrites, V, another one relies on, R: :math:`\|V^\top R\|_F^2 / k`, between 0 and 1."""
    return float((V.T @ R).square().sum()) / max(V.shape[1], 1)


def intrusion(tau: Float[Tensor, "m n"], P: Float[Tensor, "n r"]) -> float:
    r"""The share of a task vector's energy within the space protected from it: :math:`\|\tau P\|_F^2 / \|\tau\|_F^2`."""
    return float((tau.double() @ P).square().sum()) / max(float(tau.double().square().sum()), 1e-300)

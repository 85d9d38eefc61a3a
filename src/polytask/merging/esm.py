"""ESM: essential subspace merging (Li et al. 2026, arXiv:2606.19164)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Unpack

import torch

from polytask.merging.base import Place, TaskVectorMerger, TaskVectorOptions, in_range
from polytask.merging.esd import esd
from polytask.merging.spectral import in_doubt, polar_factors
from polytask.merging.tsv_m import TSVM
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "esm",
    family="merging",
    paper="arXiv:2606.19164",
    needs="statistics",
    aliases=("essential_subspace_merging",),
    invariances=("permutation", "scale"),
    exempt={"copies": "each expert gets only its share of the rank"},
)
class ESM(TaskVectorMerger):
    r"""Give each expert the directions in which its outputs move most, make them orthogonal, and let large updates speak louder.

    With :math:`U_t, V_t, \lambda_t` from :func:`~polytask.merging.esd.esd` at rank :math:`k = \lfloor m / T \rfloor`,
    :math:`\nu_t = \|\tau_t\|_F`, :math:`\omega_t = (\lambda_t / \bar\lambda_t)^q` divided by its mean, and :math:`c_j` the length of
    column j of the stacked V,

    .. math:: U = [U_t \operatorname{diag} \omega_t]_t, \qquad V = \bigl[(\nu_t / \bar\nu)^p \operatorname{diag}(\omega_t) V_t\bigr]_t
        \operatorname{diag}\bigl((c / \bar c)^p\bigr), \qquad M_l = g\, \pi(U)\, \pi(V)

    where :math:`\pi` is the polar factor at the mean singular value. Over layers l of one role (one name but for its numbers, one shape),
    :math:`M_l` is then multiplied by :math:`(\|M_l\|_F / \text{their mean})^{p'}`. Matrices without statistics are merged by TSV-M,
    other tensors by the mean, both with coefficient 1, whatever the scale.

    Args:
        power: p, between experts and between columns; the release uses 0 for RoBERTa.
        layer_power: p', between layers of one role; 0 saves reading the models twice.
        spread: q, of the eigenvalues.
        gain: g; the release uses 1 for RoBERTa.

    Cost: for each layer T decompositions of the smaller side and two of the stacks. Updates wait, in a file where models are on
    disk, until all layers are known.
    """

    needs = "statistics"
    statistic = "gramian"
    # resident memory at its peak over a merge of eight, Gramians apart: 64 tensors at 3072 x 768, where stacks and their decomposition
    # are outputs x outputs in float64; 32 at 768 x 768, 9 at 768 x 3072
    scratch = 66.0

    def __init__(
        self,
        *,
        power: float = 2.0,
        layer_power: float = 2.0,
        spread: float = 0.15,
        gain: float = 2.0,
        **base: Unpack[TaskVectorOptions],
    ) -> None:
        super().__init__(**base)
        for value, name in ((power, "power"), (layer_power, "layer_power"), (spread, "spread"), (gain, "gain")):
            in_range(value, f"{name} of esm", float("-inf"), float("inf"))
        self.power, self.layer_power, self.spread, self.gain = power, layer_power, spread, gain
        self.passes = int(layer_power != 0)
        self.tsv_m = TSVM()
        self.kept = {}
        self.begin()

    def begin(self) -> None:
        self.norms: dict[str, float] = {}
        self.roles: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
        self.factors: dict[str, float] = {}

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:
        if D.ndim == 3 and len(place.statistics):
            if place.name not in self.kept:
                weighed = D if self.weights == 1.0 else self.weighed(D.clone())
                self.kept[place.name] = self.layer(weighed, place.statistics)
            self.norms[place.name] = float(self.kept[place.name].norm())
            self.roles[role(place.name), tuple(W0.shape)].append(place.name)

    def end_pass(self) -> None:
        for names in self.roles.values():
            mean = sum(self.norms[n] for n in names) / len(names)
            self.factors |= {n: (self.norms[n] / mean) ** self.layer_power if mean > 0 else 0.0 for n in names}

    def add_to_base(self, W0: Tensor, D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if place.name in self.factors:
            return W0.add_(self.kept[place.name], alpha=self.scale * self.factors[place.name])
        alpha = self.scale if D.ndim == 3 and len(place.statistics) else 1.0
        return W0.add_(self.update(W0, self.weighed(D), place), alpha=alpha)

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if D.ndim == 3 and len(place.statistics):
            return self.layer(D, place.statistics)
        return D.mean(0) if "text_projection" in place.name else self.tsv_m.update(W0, D, place)

    def layer(self, D: Float[Tensor, "experts m n"], statistics: Iterable[Tensor]) -> Float[Tensor, "m n"]:
        """The merged update of one layer, before layers are weighed against one another."""
        left, right = self.stacks(D, statistics)
        if not len(right):
            return torch.zeros_like(D[0])
        (P, s, Q), (R, t, T) = polar_factors(left, D.dtype), polar_factors(right, D.dtype)
        if in_doubt(s):
            left, right = self.stacks(D, statistics, exact=True)
            (P, s, Q), (R, t, T) = polar_factors(left, D.dtype), polar_factors(right, D.dtype)
        # pi(U) pi(V) = P Q R T, in the cheapest order
        merged: Tensor = torch.linalg.multi_dot([P, Q, R, T])
        return merged * (self.gain * s.mean() * t.mean())

    def stacks(
        self, D: Float[Tensor, "experts m n"], statistics: Iterable[Tensor], *, exact: bool = False
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """U and V."""
        experts, m, n = D.shape
        k = m // experts or 1
        norm = torch.stack([torch.linalg.vector_norm(delta, dtype=torch.float64) for delta in D])
        # stacks of many experts are ill-conditioned, in float64 until they are orthogonal; V of a wide layer is not
        precision = D.dtype if 2 * m <= n else torch.float64
        U, V = [], []
        for delta, S, nu in zip(D, statistics, norm / norm.mean(), strict=True):
            s, U_t, V_t = esd(delta, S[:-1, :-1], k, precision, exact=exact)
            omega = (s.square() / s.square().mean()) ** self.spread
            omega = omega / omega.mean()
            U.append(U_t * omega)
            V.append((nu**self.power * omega[:, None]).to(precision) * V_t)
        right = torch.cat(V)
        c = right.norm(dim=0)
        right *= (c / c.mean()) ** self.power
        return torch.cat(U, 1), right


def role(name: str) -> str:
    """What a tensor does in whatever layer it stands: its name without the numbers."""
    return re.sub(r"\d+", "*", name)

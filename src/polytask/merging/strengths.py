"""Bayesian merges of many strengths at the price of one: every layer's sums, gathered once (arXiv:2605.12843)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch

from polytask.errors import InputError
from polytask.merging.anchored import bias_of
from polytask.merging.base import PerExpert, per_expert
from polytask.merging.bayesian_search import Found, search
from polytask.merging.in_memory import State
from polytask.merging.moments import rows
from polytask.merging.posterior import JITTER, Gram, Posterior, own_moment, second_moments

if TYPE_CHECKING:
    from torch import Tensor

LOG_STRENGTH = (-4.0, 2.0)
SCALE = (0.5, 1.5)


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        strengths: lambda of each group.
        scales: gamma of each group.
        state: the merged model with them.
        found: every trial.
    """

    strengths: Mapping[str, float]
    scales: Mapping[str, float]
    state: dict[str, Tensor]
    found: Found


@dataclass(frozen=True)
class Posteriors:
    """The posteriors of all linear layers of a model.

    Attributes:
        base: what the experts started from.
        anchor: the merge that they are pulled towards; tensors that are not fitted have its values.
        layers: by the weight's name.
    """

    base: State
    anchor: State
    layers: Mapping[str, Posterior]

    @classmethod
    def of(
        cls,
        base: State,
        experts: Sequence[State],
        anchor: State,
        statistics: Sequence[Mapping[str, Tensor]] = (),
        *,
        gram: Gram = "data",
        weights: PerExpert = 1.0,
        jointly: bool = True,
    ) -> Self:
        """Add up what every layer needs.

        Args:
            base: a state dict.
            experts: state dicts of models fine-tuned from it.
            anchor: any merge of them.
            statistics: of each expert, from :func:`~polytask.merging.gather_gramians`; without them task vectors stand for inputs.
            gram: see :class:`~polytask.merging.bmm.BMM`.
            weights: c, of the experts.
            jointly: fit a layer's weight and bias together.

        Raises:
            InputError: statistics of some experts only, or of no tensor.
        """
        if statistics and len(statistics) != len(experts):
            raise InputError(f"{len(statistics)} statistics are given for {len(experts)} experts")
        c = per_expert(weights, len(experts), "weights")
        layers = {}
        for name, W0 in base.items():
            given = [s[name] for s in statistics if name in s]
            if W0.ndim != 2 or not W0.is_floating_point() or len(given) < len(statistics):
                continue
            columns = [name, bias_of(name)] if jointly and bias_of(name) in base else [name]
            D = torch.stack([_joined(e, columns) - _joined(base, columns) for e in experts])
            moments = second_moments(D, given, gram, bias=len(columns) == 2) if given else map(own_moment, D)
            n = sum(map(rows, given)) / len(given) if given else 1.0
            layers[name] = Posterior.of(D, moments, c, _joined(anchor, columns) - _joined(base, columns), n)
        if not layers:
            raise InputError("there is no matrix to be fitted, or the statistics are of other tensors")
        return cls(base, anchor, layers)

    def merged(
        self,
        strength: float | Mapping[str, float],
        scale: float | Mapping[str, float] = 1.0,
        *,
        jitter: float = JITTER,
    ) -> dict[str, Tensor]:
        r"""The model :math:`W_0 + \gamma D(\lambda)`, with one strength and scale or one a weight's name."""
        return self._state({n: p.mean(_at(strength, n), jitter) for n, p in self.layers.items()}, scale)

    def sampled(
        self,
        strength: float | Mapping[str, float],
        scale: float | Mapping[str, float] = 1.0,
        *,
        sigma: float | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        r"""A draw from the posterior; predictions averaged over several tell how sure they are.

        Args:
            strength: as in :meth:`merged`.
            scale: as in :meth:`merged`.
            sigma: the standard deviation of an expert's answers taken together, as G takes them; when omitted, the root mean square of
                what the mean leaves, over the root of the number of inputs.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, p in self.layers.items():
            own = p.residual(p.mean(_at(strength, name))) / math.sqrt(max(p.rows, 1.0)) if sigma is None else sigma
            drawn[name] = p.sample(_at(strength, name), own, generator)
        return self._state(drawn, scale)

    def search(
        self,
        evaluate: Callable[[dict[str, Tensor]], float],
        *,
        group: Callable[[str], str] = lambda _: "all",
        scales: tuple[float, float] | None = SCALE,
        log_strengths: tuple[float, float] = LOG_STRENGTH,
        budget: int = 40,
        how: Literal["gp", "random", "grid"] = "gp",
        start: Sequence[float] = (),
        seed: int = 0,
    ) -> Tuned:
        """Look for the strengths and scales that validate best.

        Args:
            evaluate: the value of a merged state dict on validation data, higher is better.
            group: by a weight's name, which strength it shares; all share one unless told otherwise.
            scales: range of gamma; None leaves it at 1.
            log_strengths: range of the decimal logarithm of lambda.
            budget: how many merges are evaluated.
            how: see :func:`~polytask.merging.bayesian_search.search`.
            start: strengths that all groups share in the first trials, with scale 1, such as the best shared one.
            seed: of the search.
        """
        groups = {n: group(n) for n in self.layers}
        names = list(dict.fromkeys(groups.values()))
        free = scales is not None

        def parameters(z: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
            strengths = {g: 10.0**v for g, v in zip(names, z, strict=False)}
            return strengths, {g: float(z[len(names) + i]) if free else 1.0 for i, g in enumerate(names)}

        def state(z: Sequence[float]) -> dict[str, Tensor]:
            strengths, gammas = parameters(z)
            return self.merged({n: strengths[g] for n, g in groups.items()}, {n: gammas[g] for n, g in groups.items()})

        bounds = [log_strengths] * len(names) + ([scales] * len(names) if scales is not None else [])
        first = [[math.log10(s)] * len(names) + [1.0] * (len(names) * free) for s in start]
        found = search(lambda z: evaluate(state(z.tolist())), bounds, budget=budget, how=how, start=first, seed=seed)
        return Tuned(*parameters(found.best.z), state(found.best.z), found)

    def _state(self, updates: Mapping[str, Tensor], scale: float | Mapping[str, float]) -> dict[str, Tensor]:
        state = {n: v.detach().clone() for n, v in self.anchor.items()}
        for name, D in updates.items():
            joint = D.shape[1] > self.base[name].shape[1]
            parts = {name: D[:, :-1] if joint else D} | ({bias_of(name): D[:, -1]} if joint else {})
            for n, part in parts.items():
                W0 = self.base[n]
                state[n] = (W0.double() + _at(scale, name) * part).to(W0.dtype)
        return state


def _joined(state: State, names: Sequence[str]) -> Tensor:
    """A weight with its bias as the last column, float64."""
    return torch.cat(
        [v.detach().double() if v.ndim == 2 else v.detach().double()[:, None] for v in map(state.__getitem__, names)], 1
    )


def _at(value: float | Mapping[str, float], name: str) -> float:
    return value[name] if isinstance(value, Mapping) else value

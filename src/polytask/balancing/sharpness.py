"""Sharpness-aware balancing: gradients of each loss taken a short way uphill, combined by any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import Balancer, BaseOptions, nearest_combination
from polytask.balancing.looks import LookingBalancer, Looks
from polytask.errors import InputError
from polytask.registry import find


class SharpnessAware(LookingBalancer):
    """A method whose gradients are those of another method's input, taken elsewhere.

    Args:
        inner: name of the method that combines gradients; it gets the preference.
        inner_options: its options.
        rho: how far uphill, in Euclidean length.
        copies: how many balancers, each with state of its own, are made of ``inner``.
    """

    needs = "second evaluation"

    def __init__(
        self,
        inner: str,
        inner_options: Mapping[str, Any] | None,
        rho: float,
        copies: int,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(**base)
        name = self.method.name
        if not rho >= 0:
            raise InputError(f"{name} goes uphill by rho of at least 0, not {rho}")
        self.inner, self.rho = inner, rho
        self.inner_options = dict(inner_options or {})
        chosen = {"preference": self.preference, "seed": self.seed, **self.inner_options}
        self.inners: list[Balancer] = [find(inner, "balancing").factory(**chosen) for _ in range(copies)]
        for each in self.inners:  # logarithms are taken once, outside
            each.log_losses = each.log_losses and not self.log_losses
        first = self.inners[0]
        if isinstance(first, LookingBalancer) or len(first.roles) > 1 or first.needs_second_evaluation:
            raise InputError(f"{name} combines gradients by a method that looks once a step, which {inner} does not")
        self.degree = getattr(first, "degree", 0.0)

    def bind(self, tasks: Sequence[str]) -> None:
        super().bind(tasks)
        for each in self.inners:
            each.bind(tasks)

    def begin_epoch(self) -> None:
        for each in self.inners:
            each.begin_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": [each.state_dict() for each in self.inners]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for each, its in zip(self.inners, state["inner"], strict=True):
            each.load_state_dict(its)

    def combined(self, inner: Balancer, rows: Float[Tensor, "tasks shared"], looks: Looks) -> Float[Tensor, " shared"]:
        """What the inner method makes of gradients in the shared coordinates."""
        return inner.direction(rows, looks.values)  # type: ignore[attr-defined, no-any-return]

    def uphill(self, looks: Looks, slopes: Float[Tensor, "tasks coordinates"]) -> Float[Tensor, "tasks coordinates"]:
        r"""The gradient of each loss at :math:`\theta` + rho times the unit vectors of its slope, shared and own coordinates apart."""
        parts = [slopes[:, : looks.n_shared], slopes[:, looks.n_shared :]]
        sizes = [part.norm(dim=1, keepdim=True) for part in parts]
        steps = torch.cat([g / torch.where(n > 0, n, 1.0) for g, n in zip(parts, sizes, strict=True)], 1)
        rows = []
        for name, step in zip(looks.names, self.rho * steps, strict=True):
            with looks.moved(step):
                rows.append(looks.row(0, name))
        return torch.stack(rows)

    def outcome(
        self, looks: Looks, d: Float[Tensor, " shared"], own: Float[Tensor, " own"]
    ) -> tuple[Tensor, Tensor | None]:
        """The direction, and with ``every`` the weights of the plain gradients that come nearest to it."""
        direction = torch.cat([d, own])
        if self.every == 1:
            return direction, None
        return direction, torch.from_numpy(nearest_combination(looks.rows(0, heads=False), d)).to(d)

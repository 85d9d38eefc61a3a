"""Small models to merge, and the registry's mergers as parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.merging import Merger, make_filter, merge
from polytask.registry import Method, methods

State = dict[str, Tensor]
MERGERS = {m.name: m for m in methods("merging") if issubclass(m.factory, Merger)}
FILTERS = {m.name: m for m in methods("filter")}
EVERY = {**MERGERS, **FILTERS}
SHAPES = {
    "first.weight": (24, 18),
    "first.bias": (24,),
    "conv.weight": (6, 4, 3, 3),
    "last.weight": (12, 24),
    "scale": (),
}


def model(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> State:
    g = torch.Generator().manual_seed(seed)
    state = {n: size * torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}
    return {n: t.to(dtype) for n, t in state.items()} | {"steps": torch.tensor(seed)}


def family(
    experts: int, seed: int = 0, size: float = 0.1, dtype: torch.dtype = torch.float64
) -> tuple[State, list[State]]:
    """A base and models a little away from it."""
    base = model(seed, 1.0)
    away = [model(seed + 100 * (t + 1), size) for t in range(experts)]
    moved = [{n: (v + d[n]).to(dtype) if v.is_floating_point() else v for n, v in base.items()} for d in away]
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in base.items()}, moved


def along(base: State, experts: list[State], factor: float) -> list[State]:
    """The experts with every task vector times a factor."""
    return [{n: v + factor * (e[n] - v) if v.is_floating_point() else v for n, v in base.items()} for e in experts]


def merged(method: Method, base: State, experts: list[State], statistics: Any = None, **options: Any) -> State:
    """Merge with a merger, or with a filter before plain addition; statistics by expert where none are given."""
    options = {**method.example, **options}
    if method.family == "filter":
        return merge(base, experts, "task_arithmetic", filters=[make_filter(method.name, **options)], scale=1.0)
    if statistics is None and method.needs == "statistics":
        statistics = [some_statistics(method, t) for t in range(len(experts))]
    seed = options.pop("seed", 0)
    return merge(base, experts, method.name, statistics=statistics or (), seed=seed, **options)


def some_statistics(method: Method, expert: int) -> State:
    floats = {n: v for n, v in model(1000 + expert).items() if v.is_floating_point()}
    if method.factory.statistic == "fisher":
        return {n: v.square() for n, v in floats.items()}
    ones = {n: torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], 1) for n, v in floats.items() if v.ndim == 2}
    return {n: v.T @ v for n, v in ones.items()}


def experts_for(method: Method) -> int:
    return min(3, method.factory.most or 3) if method.family == "merging" else 3


def distance(a: State, b: State) -> float:
    """Largest relative distance between tensors of one name."""
    return max(
        float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in b if b[n].is_floating_point()
    )


@pytest.fixture(params=EVERY.values(), ids=EVERY)
def method(request: pytest.FixtureRequest) -> Method:
    """Every merger and filter, but those whose registration exempts it from the test, by the test's name."""
    entry: Method = request.param
    if request.node.originalname.removeprefix("test_") in entry.exempt:
        pytest.skip(entry.exempt[request.node.originalname.removeprefix("test_")])
    return entry

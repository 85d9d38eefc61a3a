"""Ways of running any registered method from per-task gradients, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polytask
from polytask.balancing import Balancer, make
from polytask.balancing.looks import looks_again
from polytask.registry import Method, methods

METHODS = {m.name: m for m in methods("balancing")}
PROPERTIES = {"permutation", "scale", "task_scale", "non_conflict", "single"}
GENERATED = PROPERTIES | {
    "rotation",
    "duplicate",
    "zero",
    "absent",
    "preference",
    "preference_length",
    "log_losses",
    "descent",
    "resume",
    "dtype",
}


# defaults that would show nothing within the few steps of a test
SHORT: dict[str, dict[str, Any]] = {"coba": {"warmup": 3, "window": 8}}


def build(method: Method, **options: Any) -> Balancer:
    return make(method.name, **{**method.example, **SHORT.get(method.name, {}), **options})


def gradients(
    seed: int, tasks: int, coordinates: int, decades: float = 0.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random per-task gradients, with a common part so that they seldom cancel, of lengths spread over some decades."""
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((tasks, coordinates)) + 0.3 * rng.standard_normal(coordinates)
    return torch.as_tensor(J * 10 ** rng.uniform(-decades / 2, decades / 2, (tasks, 1))).to(dtype)


def losses(seed: int, tasks: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).uniform(0.2, 3.0, tasks))


def run(
    balancer: Balancer, steps: Iterable[tuple[Tensor, Tensor]], names: list[str] | None = None, first: int = 0
) -> list[Tensor]:
    """The directions of a few steps, two to an epoch, with everything a training loop tells a balancer."""
    found = []
    for number, (J, values) in enumerate(steps, first):
        if names is not None:
            balancer.bind(names)
        if number % 2 == 0:
            balancer.begin_epoch()
        found.append(balancer.direction(J, values))
        if balancer.needs_second_evaluation:
            assert balancer.tasks is not None
            present = [balancer.tasks[i] for i in balancer.active]
            after = values * (1 - 0.1 * values / values.sum())
            balancer.after_step(dict(zip(present, after, strict=True)))
    return found


def fill(balancer: Balancer, evaluate: Callable[[], Mapping[str, Tensor]], shared: Sequence[Tensor]) -> None:
    """Fill ``.grad`` the way the method asks for; every batch is the same where it looks at several."""
    if looks_again(balancer):
        batches = [None] * len(balancer.roles)
        polytask.backward_batches(lambda _: evaluate(), batches, shared=shared, balancer=balancer)
    else:
        polytask.backward(evaluate(), shared=shared, balancer=balancer)


def script(tasks: int, coordinates: int = 12, steps: int = 10) -> list[tuple[Tensor, Tensor]]:
    return [(gradients(10 + s, tasks, coordinates), losses(50 + s, tasks)) for s in range(steps)]


def through_json(value: Any) -> Any:
    """A copy by way of text: nothing survives that a file of numbers and strings would not hold."""
    return _unpack(json.loads(json.dumps(_pack(value))))


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {"dict": [[k, _pack(v)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(v) for v in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value).__name__} cannot be stored"
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict) and "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if isinstance(value, dict):
        return {k: _unpack(v) for k, v in value["dict"]}
    return value


def declaring(name: str) -> pytest.MarkDecorator:
    """Run a test for the methods whose registration declares a property."""
    chosen = [m for m in METHODS.values() if name in m.invariances]
    return pytest.mark.parametrize("method", chosen, ids=[m.name for m in chosen])


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Every registered method; skipped, with the reason written at its registration, where a generated test does not apply."""
    chosen: Method = request.param
    name = request.node.originalname.removeprefix("test_")
    if name in chosen.exempt:
        pytest.skip(chosen.exempt[name])
    return chosen

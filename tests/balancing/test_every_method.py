"""What every registered balancing method must do, generated from the registry.

A test called ``test_X`` is left out for a method only where its registration says ``exempt={"X": reason}``.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import polytask
from polytask.balancing import GramianWeighting, LossWeighting
from polytask.errors import InputError
from polytask.registry import Method

from .conftest import (
    GENERATED,
    METHODS,
    PROPERTIES,
    build,
    declaring,
    fill,
    gradients,
    losses,
    run,
    script,
    through_json,
)

GRAMIAN = [m for m in METHODS.values() if issubclass(m.factory, GramianWeighting)]


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-7) -> None:
    """Equal up to a fraction of the expected length."""
    size = float(expected.double().norm())
    assert float((found.double() - expected.double()).norm()) <= relative * size, f"{found} is not {expected}"


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_registration(entry: Method) -> None:
    assert entry.summary.endswith(".")
    assert entry.paper
    assert set(entry.invariances) <= PROPERTIES
    assert set(entry.exempt) <= GENERATED
    assert {"preference", "log_losses", "every", "seed"} <= set(entry.options)
    assert all(len(reason.split()) > 3 for reason in entry.exempt.values())
    assert all(type(polytask.balancing.make(alias, **entry.example)) is entry.factory for alias in entry.aliases)


def test_permutation(method: Method) -> None:
    order = torch.tensor([2, 0, 3, 1])
    steps = script(4)
    plain = run(build(method), steps)
    shuffled = run(build(method), [(J[order], values[order]) for J, values in steps])
    for d, e in zip(plain, shuffled, strict=True):
        assert_close(e, d, 1e-6)


@pytest.mark.parametrize("c", [1e-8, 1e-4, 1e-3, 1e4, 1e8])
@pytest.mark.parametrize("tasks", [2, 5])
def test_scale(method: Method, c: float, tasks: int) -> None:
    assert "scale" in method.invariances, "a method either declares what scaling does or is exempt with a reason"
    steps = script(tasks)
    a, b = build(method), build(method)
    if isinstance(a, LossWeighting):
        # the losses scaled: the same weights up to a common factor
        plain, scaled = run(a, steps), run(b, [(J, c * values) for J, values in steps])
        for d, e in zip(plain, scaled, strict=True):
            assert_close(e / e.norm(), d / d.norm(), 1e-5)
    else:
        degree = 1 + 2 * getattr(a, "degree", 0.0)
        plain, scaled = run(a, steps), run(b, [(c * J, values) for J, values in steps])
        for d, e in zip(plain, scaled, strict=True):
            assert_close(e, c**degree * d, 1e-6)


@declaring("task_scale")
def test_task_scale(method: Method) -> None:
    J = gradients(1, 4, 9)
    factors = torch.tensor([1e-3, 1.0, 20.0, 1e4], dtype=J.dtype)[:, None]
    d, e = (build(method).direction(rows, losses(1, 4)) for rows in (J, factors * J))
    assert_close(e / e.norm(), d / d.norm(), 1e-6)


@pytest.mark.parametrize("method", GRAMIAN, ids=[m.name for m in GRAMIAN])
def test_rotation(method: Method) -> None:
    b = build(method)
    Q = torch.linalg.qr(gradients(3, 12, 12))[0]
    steps = script(4)
    for d, e in zip(run(b, steps), run(build(method), [(J @ Q, v) for J, v in steps]), strict=True):
        assert_close(e, d @ Q, 1e-6)


def test_single(method: Method) -> None:
    for J, values in script(1, steps=6):
        b = build(method)
        d = run(b, [(J, values)])[0]
        if "single" in method.invariances:
            assert_close(d, J[0], 1e-6)
        assert_close(d / d.norm(), J[0] / J[0].norm(), 1e-6)


def test_duplicate(method: Method) -> None:
    J, values = gradients(4, 3, 8), losses(4, 3)
    twice, twice_values = torch.cat([J, J[:1]]), torch.cat([values, values[:1]])
    b = build(method)
    d = b.direction(twice, twice_values)
    assert bool(torch.isfinite(d).all())
    assert float(d.norm()) > 1e-3 * float(J.norm(dim=1).min())
    swapped = build(method).direction(twice[[3, 1, 2, 0]], twice_values[[3, 1, 2, 0]])
    assert_close(swapped, d, 1e-6)
    if "non_conflict" in method.invariances:
        assert float((twice @ d).min()) >= -1e-7 * float(d.norm() * J.norm())


def test_zero(method: Method) -> None:
    J, values = gradients(5, 4, 8), losses(5, 4)
    J[1] = 0
    d = build(method).direction(J, values)
    assert bool(torch.isfinite(d).all())
    b = build(method)
    if isinstance(b, GramianWeighting):
        kept = [0, 2, 3]
        assert float(b.weights(J @ J.T, values)[1]) == 0
        assert_close(d, build(method).direction(J[kept], values[kept]), 1e-7)
    nothing = build(method).direction(torch.zeros_like(J), values)
    assert bool((nothing == 0).all())


def test_absent(method: Method) -> None:
    names, some = ["a", "b", "c", "d"], ["b", "d"]
    rows = [1, 3]
    b = build(method)
    run(b, script(4)[:5], names)
    before, generator = (b.state_dict()[part] for part in ("state", "rng"))
    b.bind(some)
    J, values = script(4)[5]
    d = b.direction(J[rows], values[rows])
    assert bool(torch.isfinite(d).all())
    for key, old in before.items():
        if isinstance(old, np.ndarray | torch.Tensor) and old.ndim and old.shape[0] == 4:
            new = b.state[key]
            assert np.array_equal(np.asarray(new)[[0, 2]], np.asarray(old)[[0, 2]], equal_nan=True), key
    if not before:
        alone = build(method)
        alone.load_state_dict({**b.state_dict(), "rng": generator, "tasks": some})
        assert_close(d, alone.direction(J[rows], values[rows]), 1e-9)
    b.bind(names)
    assert bool(torch.isfinite(b.direction(J, values)).all())


def test_resume(method: Method) -> None:
    steps = script(3)
    straight = build(method)
    expected = run(straight, steps, ["x", "y", "z"])
    for cut in (0, 1, 5, 8):
        first, second = build(method, seed=0), build(method, seed=123)
        done = run(first, steps[:cut], ["x", "y", "z"])
        second.load_state_dict(through_json(first.state_dict()))
        rest = run(second, steps[cut:], ["x", "y", "z"], first=cut)
        for d, e in zip([*done, *rest], expected, strict=True):
            assert torch.equal(d, e)


def test_state_is_eager(method: Method) -> None:
    b = build(method)
    b.bind(["x", "y", "z"])
    keys = set(b.state)
    run(b, script(3), ["x", "y", "z"])
    assert set(b.state) == keys


def test_determinism(method: Method) -> None:
    once, again = (run(build(method, seed=7), script(3)) for _ in range(2))
    assert all(torch.equal(d, e) for d, e in zip(once, again, strict=True))


@declaring("non_conflict")
@pytest.mark.parametrize("seed", range(12))
def test_non_conflict(method: Method, seed: int) -> None:
    tasks = 2 + seed % 5
    for coordinates, decades in ((tasks + 3, 0.0), (tasks + 3, 6.0), (max(tasks - 1, 1), 0.0)):
        J = gradients(seed, tasks, coordinates, decades) * 10.0 ** (3 * (seed % 5) - 6)
        w = build(method).weights(J @ J.T, losses(seed, tasks))
        size = float((w.abs() * J.norm(dim=1)).sum())
        assert float((J @ (w @ J) / J.norm(dim=1)).min()) >= -1e-9 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(method: Method, dtype: torch.dtype) -> None:
    J, values = gradients(8, 4, 40), losses(8, 4)
    J, values = J.to(dtype), values.to(dtype)
    d = build(method).direction(J, values)
    assert d.dtype == dtype
    assert_close(d, build(method).direction(J.double(), values.double()), 1e-5 if dtype == torch.float32 else 0.03)


def test_preference(method: Method) -> None:
    J, values = gradients(9, 3, 8), losses(9, 3)
    plain = build(method).direction(J, values)
    leaning = build(method, preference=[1.0, 2.0, 6.0]).direction(J, values)
    assert float((leaning - plain).norm()) > 1e-3 * float(plain.norm())
    named = build(method, preference={"a": 1.0, "c": 6.0, "b": 2.0})
    named.bind(["a", "b", "c"])
    assert_close(named.direction(J, values), leaning, 1e-9)
    with pytest.raises(InputError, match="3 numbers for 2 tasks"):
        build(method, preference=[1.0, 2.0, 3.0]).direction(J[:2], values[:2])
    with pytest.raises(InputError, match="positive"):
        build(method, preference=[1.0, -2.0])


def test_preference_length(method: Method) -> None:
    """Only the direction of a preference vector counts."""
    J, values = gradients(9, 3, 8), losses(9, 3)
    short, long = (build(method, preference=p).direction(J, values) for p in ([1.0, 2.0, 6.0], [2.0, 4.0, 12.0]))
    assert_close(long, short, 1e-6)


def quadratics(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three losses with one common minimum, of different scales and curvatures."""
    curvatures = torch.tensor([[1.0, 2.0, 0.5, 1.0], [3.0, 0.2, 1.0, 1.0], [0.5, 1.0, 1.0, 4.0]], dtype=x.dtype)
    return {
        n: s * (1 + (c * (x - 1) ** 2).sum() / 2) for n, s, c in zip("abc", (0.5, 1.0, 3.0), curvatures, strict=True)
    }


def test_descent(method: Method) -> None:
    """Every method finds the minimum that all losses share."""
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 0.5, 4.0], dtype=torch.float64))
    b = build(method)
    start = {n: float(v.detach()) for n, v in quadratics(x).items()}
    rates = torch.linspace(0.3, 0.01, 150).tolist()
    for step, rate in enumerate(rates):
        if step % 10 == 0:
            b.begin_epoch()
        x.grad = None
        fill(b, functools.partial(quadratics, x), [x])
        assert x.grad is not None
        with torch.no_grad():
            x -= rate * x.grad / max(1.0, float(x.grad.norm()))
            if b.needs_second_evaluation:
                b.after_step(quadratics(x))
    end = {n: float(v.detach()) for n, v in quadratics(x).items()}
    least = {"a": 0.5, "b": 1.0, "c": 3.0}
    assert all(end[n] - least[n] < 0.05 * (start[n] - least[n]) for n in start), end


def test_log_losses(method: Method) -> None:
    """Balancing log L is balancing the losses log L; methods that take logarithms themselves do not take them twice."""
    found = []
    for option in (True, False):
        x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 0.5, 4.0], dtype=torch.float64))
        b = build(method, log_losses=option)
        logarithms = not option and not b.takes_logarithms

        def values(x: torch.Tensor = x, logarithms: bool = logarithms) -> dict[str, torch.Tensor]:
            return {n: (10 * v).log() if logarithms else 10 * v for n, v in quadratics(x).items()}

        fill(b, values, [x])
        assert x.grad is not None
        found.append(x.grad)
    assert_close(found[0], found[1], 1e-9)


def test_refuses_bad_input(method: Method) -> None:
    J, values = gradients(9, 3, 8), losses(9, 3)
    b = build(method)
    b.bind(["a", "b", "c"])
    with pytest.raises(InputError, match="not one of them"):
        b.bind(["a", "z"])
    with pytest.raises(InputError, match="serves 3 tasks and was given 2"):
        b.direction(J[:2], values[:2])
    if not isinstance(b, LossWeighting):
        J[1, 2] = torch.nan
        with pytest.raises(InputError, match=r"gradients of .*b.* not finite"):
            b.direction(J, values)

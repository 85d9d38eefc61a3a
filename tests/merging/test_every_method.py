"""What every registered merger and filter must do, generated from the registry.

A test called ``test_X`` is left out for a method only where its registration says ``exempt={"X": reason}``.
"""

from __future__ import annotations

import pytest
import torch

from polytask.errors import InputError
from polytask.merging import TaskVectorMerger, make, make_filter
from polytask.registry import Method, find

from .conftest import EVERY, MERGERS, SHAPES, along, distance, experts_for, family, merged

GENERATED = {"permutation", "copies", "scale"}


@pytest.mark.parametrize("entry", EVERY.values(), ids=EVERY)
def test_registration(entry: Method) -> None:
    assert entry.summary.endswith(".")
    assert entry.paper
    assert set(entry.invariances) <= GENERATED | {"rotation"}
    # each generated property is either promised or excused
    assert set(entry.exempt) | set(entry.invariances) >= GENERATED
    assert not set(entry.exempt) & set(entry.invariances)
    assert all(len(reason.split()) > 3 for reason in entry.exempt.values())
    assert all(find(alias).name == entry.name for alias in entry.aliases)
    assert entry.needs == getattr(entry.factory, "needs", "base")


def test_no_change(method: Method) -> None:
    base, _ = family(1)
    result = merged(method, base, [dict(base) for _ in range(experts_for(method))])
    assert list(result) == list(base)
    assert distance(result, base) < 1e-12


def test_integers_are_the_base_s(method: Method) -> None:
    base, experts = family(experts_for(method))
    for t, e in enumerate(experts):
        e["steps"] = torch.tensor(t)
    base["steps"] = torch.tensor(77)
    result = merged(method, base, experts)
    assert result["steps"] == 77
    assert {n: tuple(v.shape) for n, v in result.items() if n != "steps"} == SHAPES


def test_inputs_are_left_alone(method: Method) -> None:
    base, experts = family(experts_for(method))
    copies = [{n: v.clone() for n, v in s.items()} for s in (base, *experts)]
    merged(method, base, experts)
    for state, copy in zip((base, *experts), copies, strict=True):
        assert all(torch.equal(state[n], copy[n]) for n in copy)


def test_permutation(method: Method) -> None:
    base, experts = family(experts_for(method), seed=1)
    order = [2, 0, 1][: len(experts)] if len(experts) == 3 else [1, 0]
    given = None
    if method.needs == "statistics":
        from .conftest import some_statistics

        given = [some_statistics(method, t) for t in range(len(experts))]
    plain = merged(method, base, experts, given)
    shuffled = merged(method, base, [experts[i] for i in order], given and [given[i] for i in order])
    assert distance(shuffled, plain) < 1e-9


def test_copies(method: Method) -> None:
    base, (expert,) = family(1, seed=2)
    options = {"scale": 1.0} if "scale" in method.options else {}
    result = merged(method, base, [expert] * experts_for(method), **options)
    assert distance(result, expert) < 1e-9


@pytest.mark.parametrize("factor", [1e-3, -1.0, 20.0])
def test_scale(method: Method, factor: float) -> None:
    base, experts = family(experts_for(method), seed=3)
    if method.family == "merging" and not issubclass(method.factory, TaskVectorMerger):
        # nothing but the weights: the whole merge is homogeneous
        scaled = [{n: factor * v if v.is_floating_point() else v for n, v in e.items()} for e in experts]
        expected = {n: factor * v for n, v in merged(method, base, experts).items() if v.is_floating_point()}
        assert distance(merged(method, base, scaled), expected) < 1e-9
        return
    plain, scaled = merged(method, base, experts), merged(method, base, along(base, experts, factor))
    for n, v in base.items():
        if v.is_floating_point():
            expected, found = factor * (plain[n] - v), scaled[n] - v
            assert float((found - expected).norm()) <= 1e-8 * float(expected.norm() + v.norm() * 1e-5)


@pytest.mark.parametrize("entry", [m for m in MERGERS.values() if "rotation" in m.invariances], ids=lambda m: m.name)
def test_rotation(entry: Method) -> None:
    base, experts = family(3, seed=4)
    P, Q = (
        torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]
        for n in (24, 18)
    )
    name = "first.weight"
    turned = [{name: P @ e[name] @ Q} for e in (base, *experts)]
    plain = merged(entry, {name: base[name]}, [{name: e[name]} for e in experts])
    found = merged(entry, turned[0], turned[1:])
    assert distance(found, {name: P @ plain[name] @ Q}) < 1e-9


def test_seed(method: Method) -> None:
    base, experts = family(experts_for(method), seed=5)
    first, second = (merged(method, base, experts) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in base)
    if method.family == "merging":
        other = merged(method, base, experts, seed=1)
        random = "drawn" in method.exempt.get("permutation", "")
        assert (distance(other, first) > 1e-3) == random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(method: Method, dtype: torch.dtype) -> None:
    base, experts = family(experts_for(method), seed=6, dtype=dtype)
    result = merged(method, base, experts)
    assert all(v.dtype == base[n].dtype for n, v in result.items())
    # the same arithmetic on the same rounded numbers, rounded once at the end
    wide, *experts = [{n: v.float() if v.is_floating_point() else v for n, v in s.items()} for s in (base, *experts)]
    exact = merged(method, wide, experts)
    for n, v in exact.items():
        assert torch.equal(v.to(dtype) if v.is_floating_point() else v, result[n])


def test_one_expert_is_enough_or_refused(method: Method) -> None:
    base, experts = family(1, seed=7)
    fewest = getattr(method.factory, "fewest", 1)
    if fewest > 1:
        with pytest.raises(InputError, match=f"{method.name} merges at least {fewest} experts, not 1"):
            merged(method, base, experts)
    else:
        assert all(bool(torch.isfinite(v).all()) for v in merged(method, base, experts).values())


def test_wrong_numbers_of_weights_are_refused() -> None:
    for name, entry in MERGERS.items():
        if "weights" in entry.options:
            base, experts = family(experts_for(entry))
            with pytest.raises(InputError, match=f"weights holds 1 numbers for {len(experts)} experts"):
                merged(entry, base, experts, weights=[1.0])
            assert issubclass(entry.factory, TaskVectorMerger) or name in (
                "weighted",
                "fisher",
                "multislerp",
                "nuslerp",
                "karcher",
            )


def test_equal_weights_are_one_weight(method: Method) -> None:
    if "weights" not in method.options:
        pytest.skip("takes no weights")
    base, experts = family(experts_for(method), seed=8)
    one, each = (merged(method, base, experts, weights=w) for w in (1.0, [1.0] * len(experts)))
    assert distance(each, one) < 1e-9


def test_unknown_options_are_refused(method: Method) -> None:
    with pytest.raises(InputError, match=f"{method.name} has no option 'colour'"):
        (make if method.family == "merging" else make_filter)(method.name, colour=3)

"""RanDeS: a sum of which every expert knows its own signs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import MaskedExperts, merge, pack
from polytask.merging.base import Place
from polytask.merging.randes import signs
from polytask.training.merges import candidate

from .conftest import SHAPES, distance, family
from .test_oracles import close, rows

MATRICES = [n for n, shape in SHAPES.items() if len(shape) == 2]


def one(W0: Tensor, D: Tensor, expert: int = 0, seed: int = 0, **options: object) -> Tensor:
    return merge({"w": W0}, [{"w": W0 + d} for d in D], "randes", expert=expert, seed=seed, **options)["w"] - W0  # type: ignore[arg-type]


def test_it_is_its_formula() -> None:
    W0, D = rows(7, 9), rows(3, 7, 9, seed=1)
    C = [torch.diag(signs(Place("w", 5), t, D[0])) for t in range(3)]
    assert {float(c) for each in C for c in each.diagonal()} == {-1.0, 1.0}
    tau = sum(d @ c for d, c in zip(D, C, strict=True))
    for t in range(3):
        assert close(one(W0, D, t, seed=5), 0.5 * tau @ torch.linalg.inv(C[t]))
    assert not any(torch.equal(C[s], C[t]) for s in range(3) for t in range(s))
    assert not torch.equal(C[0].diagonal(), signs(Place("v", 5), 0, D[0]))


def test_the_expert_is_the_mean_and_the_others_the_spread() -> None:
    W0, D = torch.zeros(3, 400).double(), rows(4, 3, 400, seed=1)
    draws = torch.stack([one(W0, D, 1, seed=s, scale=1.0) for s in range(100)])
    others = D[[0, 2, 3]].square().sum(0)
    # ten standard errors of 1200 means; variances within a few percent over all entries
    assert bool(((draws.mean(0) - D[1]).abs() < 10 * (others / 100).sqrt() / 2).all())
    assert float((draws - D[1]).square().mean(0).sum() / others.sum()) == pytest.approx(1.0, abs=0.05)


def test_one_expert_alone_and_experts_in_other_columns_come_back_whole() -> None:
    W0, D = rows(6, 9), rows(3, 6, 9, seed=1)
    assert close(one(W0, D[:1], scale=1.0), D[0])
    for t in range(3):
        D[t, :, torch.arange(9) % 3 != t] = 0
    for t in range(3):
        found = one(W0, D, t, scale=1.0)
        assert torch.allclose(found[:, t::3], D[t, :, t::3], rtol=1e-9, atol=1e-12)


def test_tensors_without_signs_are_added_up() -> None:
    base, experts = family(3)
    found, added = merge(base, experts, "randes", expert=2), merge(base, experts, "task_arithmetic", scale=0.5)
    for n in base:
        assert torch.allclose(found[n].double(), added[n].double(), rtol=1e-9) == (n not in MATRICES)
    plain = merge(base, experts, "randes", expert=2, layers="nothing")
    assert distance(plain, added) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_for_one_expert_is_packing_and_unpacking(dtype: torch.dtype, tmp_path: Path) -> None:
    base, experts = family(3, dtype=dtype)
    named = {
        n: {**e, "last.weight": torch.randn(t + 2, 24)} for t, (n, e) in enumerate(zip("abc", experts, strict=True))
    }
    packed = pack(base, named, "randes", skip=["last.*"], seed=3, scale=0.7)
    packed.save(tmp_path / "packed")
    read = MaskedExperts.load(tmp_path / "packed")
    for name in "abc":
        found = merge(base, named, "randes", skip=["last.*"], expert=name, seed=3, scale=0.7)
        for unpacked in (packed.expert(name), read.expert(name)):
            assert sorted(unpacked) == sorted(found)
            assert distance(unpacked, found) < (1e-12 if dtype == torch.float64 else 1e-2)
        other = pack(base, named, "randes", skip=["last.*"], seed=4, scale=0.7).expert(name)
        assert distance(other, found) > 1e-3


def test_two_models_are_kept_whatever_the_number_of_experts() -> None:
    W0 = torch.zeros(64, 64)
    for T in (1, 9):
        packed = pack({"w": W0}, [{"w": rows(64, 64, seed=t, dtype=torch.float32)} for t in range(T)], "randes")
        assert packed.bytes == 2 * 4 * 64**2


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_any_size(size: float) -> None:
    W0, D = torch.zeros(9, 8), rows(3, 9, 8, dtype=torch.float32)
    assert close(one(W0, size * D) / size, one(W0, D), 1e-6)
    assert not one(W0, 0 * D).any()
    # a copy comes in twice or not at all, column by column
    copied = one(W0, D[:1].repeat(2, 1, 1), scale=0.5)
    whole = (copied != 0).any(0)
    assert 0 < int(whole.sum()) < 8
    assert torch.equal(copied, D[0] * whole)


def test_the_scale_is_searched_where_methods_are_compared() -> None:
    assert candidate("randes", experts=4).axes == {"scale": (0.5, 0.25, 1.0)}
    assert candidate("bitdelta", experts=4).axes == {}
    assert candidate("randes", experts=4, options={"scale": 0.4}).axes == {}


def test_refusals() -> None:
    base, experts = family(2)
    with pytest.raises(InputError, match="keeps experts apart: say whose model is wanted"):
        merge(base, experts, "randes")
    with pytest.raises(InputError, match="there is no expert 2 among 2"):
        merge(base, experts, "randes", expert=2)
    with pytest.raises(InputError, match="the scale is a number"):
        merge(base, experts, "randes", expert=0, scale="large")

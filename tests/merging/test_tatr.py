"""The trust region of TATR, as a method and as a filter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import make, make_filter, merge

from .conftest import distance, family
from .test_oracles import PLACE, close, of, rows


def naive_conflict(D: Tensor) -> Tensor:
    T = range(len(D))
    return sum(D[s].abs() * D[t].abs() for s in T for t in T if s != t)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9])
def test_entries_above_the_quantile_stay_the_base_s(quantile: float) -> None:
    W0, D = rows(8, 10), rows(4, 8, 10, seed=1)
    Omega = naive_conflict(D)
    theta = Omega.flatten().sort().values[min(int(quantile * 80), 79)]
    expected = 0.3 * D.sum(0) * (Omega < theta)
    found = of("tatr", W0, W0 + D, quantile=quantile) - W0
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-15)
    assert int((found != 0).sum()) == int(quantile * 80)


def test_the_whole_model_s_quantile() -> None:
    base, experts = family(3)
    names = [n for n, v in base.items() if v.is_floating_point()]
    D = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in names]) for e in experts])
    Omega = naive_conflict(D)
    theta = Omega.sort().values[int(0.8 * len(Omega))]
    found = merge(base, experts, "tatr", quantile=0.8, scope="model", scale=1.0)
    assert torch.allclose(
        torch.cat([(found[n] - base[n]).flatten() for n in names]), D.sum(0) * (Omega < theta), rtol=1e-9, atol=1e-12
    )


def test_the_filter_goes_before_any_method() -> None:
    base, experts = family(3)
    filtered = merge(base, experts, "task_arithmetic", filters=["trust_region:quantile=0.7"], weights=[1.0, 2.0, -1.0])
    assert distance(merge(base, experts, "tatr", quantile=0.7, weights=[1.0, 2.0, -1.0]), filtered) < 1e-12
    everywhere = merge(base, experts, "tatr", quantile=0.0)
    assert distance(everywhere, base) < 1e-12, "nobody is trusted anywhere"


def test_what_no_other_expert_moved_is_trusted() -> None:
    D = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 5.0, 3.0, -2.0]])
    found = make_filter("trust_region", quantile=0.0).apply(D[0], D.clone(), PLACE)
    assert found.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]]
    assert torch.equal(of("tatr", torch.zeros(4), D[:1], quantile=0.0, scale=1.0), D[0])


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_any_size(size: float) -> None:
    W0, D = torch.zeros(9, 8), rows(3, 9, 8, dtype=torch.float32)
    assert close(of("tatr", W0, size * D, quantile=0.6) / size, of("tatr", W0, D, quantile=0.6), 1e-5)
    assert close(
        of("tatr", W0, D[:1].repeat(2, 1, 1), quantile=1.0, scale=1.0)[D[0].abs() < 1], 2 * D[0][D[0].abs() < 1]
    )
    assert not of("tatr", W0, 0 * D).any()


def test_refusals() -> None:
    for options, said in (({"quantile": 1.2}, "quantile"), ({"scope": "layer"}, "scope of a trust region")):
        with pytest.raises(InputError, match=said):
            make("tatr", **options)

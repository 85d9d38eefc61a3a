"""MagMax: the entry that moved furthest."""

from __future__ import annotations

import pytest
import torch

from polytask.merging import merge

from .conftest import distance, family
from .test_oracles import close, of, rows


def test_every_entry_is_the_furthest_one() -> None:
    W0, D = rows(7, 9), rows(4, 7, 9, seed=1)
    furthest = D.gather(0, D.abs().argmax(0, keepdim=True))[0]
    assert close(of("magmax", W0, W0 + D) - W0, 0.5 * furthest)
    w = [1.0, -3.0, 0.5, 1.0]
    weighed = D * torch.tensor(w).view(-1, 1, 1)
    expected = weighed.gather(0, weighed.abs().argmax(0, keepdim=True))[0]
    assert close(of("magmax", W0, W0 + D, weights=w, scale=1.0) - W0, expected)


def test_ties_do_not_depend_on_the_order() -> None:
    D = torch.tensor([[2.0, -1.0, 0.0], [-2.0, 1.0, 0.0]]).double()
    for rows_ in (D, D.flip(0)):
        assert of("magmax", torch.zeros(3).double(), rows_, scale=1.0).tolist() == [2.0, 1.0, 0.0]


def test_experts_that_touch_different_entries_are_added_up() -> None:
    base, experts = family(3)
    owner = {n: torch.arange(v.numel()).view(v.shape) % 3 for n, v in base.items()}
    apart = [{n: torch.where(owner[n] == t, e[n], base[n]) for n in base} for t, e in enumerate(experts)]
    total = merge(base, apart, "task_arithmetic", scale=1.0)
    assert distance(merge(base, apart, "magmax", scale=1.0), total) < 1e-12


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_one_expert_and_zeros_at_any_size(size: float) -> None:
    D = size * rows(1, 5, 6, dtype=torch.float32)
    W0 = torch.zeros(5, 6)
    assert torch.equal(of("magmax", W0, D, scale=1.0), D[0])
    assert torch.equal(of("magmax", W0, torch.cat([D, torch.zeros_like(D)]), scale=1.0), D[0])

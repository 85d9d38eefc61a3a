"""Methods that draw at random treat the tasks alike in distribution, and draw what their seed says."""

from __future__ import annotations

import pytest
import torch

from polytask.autograd import LinearGradients
from polytask.balancing import make

from .conftest import gradients, losses

ORDER = [2, 0, 1]


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "rlw", "graddrop"])
def test_permutation_in_distribution(name):
    J, values = gradients(2, 3, 3), losses(2, 3)
    plain, shuffled = make(name, seed=1), make(name, seed=2)
    a = torch.stack([plain.direction(J, values) for _ in range(800)])
    b = torch.stack([shuffled.direction(J[ORDER], values[ORDER]) for _ in range(800)])
    error = (a.var(0) / 800 + b.var(0) / 800).sqrt()
    assert bool(((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-9).all())


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "rlw", "graddrop"])
def test_seeds_differ_and_steps_differ(name):
    J, values = gradients(3, 5, 6), losses(2, 5)
    J = J - 0.8 * J.mean(0)  # gradients in conflict
    b = make(name, seed=1)
    first, second = b.direction(J, values), b.direction(J, values)
    other = make(name, seed=2).direction(J, values)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_graddrop_leaks():
    J = gradients(4, 3, 30)
    assert torch.allclose(make("graddrop", leak=1.0).direction(J), J.sum(0))
    some = make("graddrop", leak=[1.0, 0.0, 0.0]).direction(J)
    none = make("graddrop", leak=0.0).direction(J)
    extra = (some - none) / J[0]
    # the same draw: only what the first task would have lost comes back
    assert bool(
        (
            torch.isclose(extra, torch.zeros(30).double(), atol=1e-12) | torch.isclose(extra, torch.ones(30).double())
        ).all()
    )
    assert bool(extra.abs().sum() > 1)


@pytest.mark.parametrize("leak", [0.0, 0.3, [1.0, 0.0, 0.5]])
def test_graddrop_draws_the_same_in_whatever_form_gradients_arrive(leak):
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 300, generator=generator, dtype=torch.float64)
    gradients = LinearGradients(D, W, [slice(k, k + 1) for k in range(3)])
    found = []
    for options in ({}, {"every": 2}):
        for preference in (None, [1.0, 2.0, 3.0]):
            one, other = (make("graddrop", seed=1, leak=leak, preference=preference, **options) for _ in range(2))
            for b in (one, other):
                b.bind(["a", "b", "c"])
            by_rows = one.direction(gradients.rows())
            assert torch.allclose(other.direction_at(gradients, 1.0, None), by_rows, rtol=1e-9, atol=1e-12)
            found.append(by_rows)
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


def test_graddrop_keeps_whole_what_nobody_opposes():
    J = torch.randn(4, 50_000).abs() * torch.where(torch.rand(50_000) < 0.5, -1.0, 1.0)
    for seed in range(5):
        assert torch.allclose(make("graddrop", seed=seed).direction(J), J.sum(0), rtol=1e-5)

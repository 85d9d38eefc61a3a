"""DOGE against autograd and the objective it descends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import make

from .test_oracles import close, naive_trim, of, rows


def lambdas(D: Tensor, eta: float) -> Tensor:
    return eta / D.flatten(1).norm(dim=1)


def objective(D: Tensor, lam: Tensor, Delta: Tensor) -> Tensor:
    total = sum(a * (d + Delta) for a, d in zip(lam, D, strict=True))
    return sum(((d * (d - total)).sum(1) ** 2).sum() for d in D)


def by_autograd(D: Tensor, eta: float, density: float, rank: int, steps: int, rate: float) -> Tensor:
    T, k = len(D), min(D.shape[1:]) // len(D)
    lam = lambdas(D, eta)
    B = torch.linalg.svd(torch.cat([torch.linalg.svd(d)[0][:, :k] for d in D], 1))[0][:, :rank]
    Delta = torch.zeros_like(D[0], requires_grad=True)
    optimizer = torch.optim.Adam([Delta], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(D, lam, Delta).backward()
        Delta.grad -= B @ B.T @ Delta.grad
        optimizer.step()
    kept = [(naive_trim(d, density) != 0) * (d + Delta.detach()) for d in D]
    return sum(lam[t] * kept[t] for t in range(T))


@pytest.mark.parametrize("shape", [(14, 20), (20, 14)])
def test_it_is_the_descent_by_autograd(shape: tuple[int, int]) -> None:
    W0, D = rows(*shape), rows(3, *shape, seed=1)
    found = of("doge", W0, W0 + D, eta=2.0, density=0.4, shared=3 / 14, steps=40, learning_rate=1e-2) - W0
    assert close(found, by_autograd(D, 2.0, 0.4, 3, 40, 1e-2), 1e-8)


def test_without_steps_or_trimming_it_is_task_arithmetic_of_equal_lengths() -> None:
    W0, D = rows(8, 9), rows(3, 8, 9, seed=1)
    lam = lambdas(D, 0.07)
    expected = of("task_arithmetic", W0, W0 + D, scale=1.0, weights=lam.tolist()) - W0
    assert close(of("doge", W0, W0 + D, steps=0, density=1.0) - W0, expected)
    weighed = of("task_arithmetic", W0, W0 + D, scale=0.5, weights=(lam * torch.tensor([1.0, 2.0, 0.0])).tolist()) - W0
    assert close(of("doge", W0, W0 + D, steps=0, density=1.0, weights=[1.0, 2.0, 0.0], scale=0.5) - W0, weighed)


def test_the_objective_falls_and_the_shared_space_is_spared() -> None:
    W0, D = torch.zeros(12, 15).double(), rows(4, 12, 15, seed=1)
    lam = lambdas(D, 1.0)
    merger = make("doge", eta=1.0, steps=200, learning_rate=1e-2)
    Delta = merger.descend(D, lam)  # type: ignore[attr-defined]
    assert float(objective(D, lam, Delta)) < 0.9 * float(objective(D, lam, torch.zeros_like(Delta)))
    # with plain steps in place of Adam's the update would have nothing along B; a space of everything leaves nothing to do
    whole = make("doge", eta=1.0, shared=1.0, steps=200)
    assert close(whole.shared_space(D) @ whole.shared_space(D).T, torch.eye(12).double())  # type: ignore[attr-defined]
    still = of("doge", W0, D, eta=1.0, shared=1.0, density=1.0, steps=5, learning_rate=1e-9)
    assert close(still, torch.tensordot(lam, D, dims=1), 1e-6)


def test_the_whole_model_s_thresholds_as_the_authors_take_them() -> None:
    from polytask.merging import merge

    base = {"a": rows(6, 7), "b": rows(5, 4, seed=1), "bias": rows(9, seed=2)}
    experts = [{n: v + (1 + 2 * (n == "a")) * rows(*v.shape, seed=10 * t + 3) for n, v in base.items()} for t in (1, 2)]
    found = merge(base, experts, "doge", scope="model", steps=0, density=0.3)
    assert torch.equal(found["bias"], base["bias"])
    for n in ("a", "b"):
        expected = torch.zeros_like(base[n])
        for e in experts:
            flat = torch.cat([(e[m] - base[m]).flatten() for m in ("a", "b")])
            theta = flat.abs().sort(descending=True).values[int(0.3 * len(flat)) - 1]
            tau = e[n] - base[n]
            expected += 0.07 / tau.norm() * tau * (tau.abs() >= theta)
        assert close(found[n] - base[n], expected)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_lengths_whatever_the_experts_are(size: float) -> None:
    W0, D = torch.zeros(9, 8), size * rows(2, 9, 8, dtype=torch.float32)
    found = of("doge", W0, D[:1], steps=0, density=1.0)
    assert float(found.norm()) == pytest.approx(0.07, rel=1e-5)
    for expert in (D, D[:1].repeat(3, 1, 1), torch.cat([D, torch.zeros_like(D)])):
        assert bool(torch.isfinite(of("doge", W0, expert)).all())
    assert not of("doge", W0, torch.zeros_like(D)).any()


def test_refusals() -> None:
    for options, said in (
        ({"eta": -1.0}, "eta of doge"),
        ({"shared": 1.5}, "shared part"),
        ({"steps": -1}, "steps >= 0"),
        ({"learning_rate": 0.0}, "learning rate > 0"),
        ({"density": 0.0}, "density"),
    ):
        with pytest.raises(InputError, match=said):
            make("doge", **options)

"""SVC, KnOTS and PCB: what their papers say of constructed cases, and their formulas written down naively."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import make, merge


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(name: str, D: Tensor, **options: object) -> Tensor:
    W0 = torch.zeros(D.shape[1:], dtype=D.dtype)
    return merge({"w": W0}, [{"w": d} for d in D], name, **options)["w"]  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor, relative: float = 1e-9) -> bool:
    return float((found - expected).norm()) <= relative * float(expected.norm())


# --- SVC


def test_svc_counts_common_knowledge_once_and_leaves_the_rest() -> None:
    Q, _ = torch.linalg.qr(rows(12, 12))
    R, _ = torch.linalg.qr(rows(10, 10, seed=1))
    common = 3.0 * torch.outer(Q[:, 0], R[:, 0])
    own = [(1.0 + t) * torch.outer(Q[:, 1 + t], R[:, 1 + t]) for t in range(3)]
    D = torch.stack([common + o for o in own])
    assert close(update("task_arithmetic", D, scale=1.0), 3 * common + sum(own))
    assert close(update("svc", D), common + sum(own))


def test_svc_is_its_formula() -> None:
    D = rows(4, 9, 7, seed=2)
    U, sigma, Vh = torch.linalg.svd(D.sum(0), full_matrices=False)
    expected = torch.zeros(9, 7, dtype=torch.float64)
    for u, s, v in zip(U.T, sigma, Vh, strict=True):
        coefficients = [float((u @ D.sum(0)) @ (u @ d) / (u @ d).square().sum()) for d in D]
        expected += 4 / sum(max(0.8, c) for c in coefficients) * s * torch.outer(u, v)
    assert close(update("svc", D, alpha=0.8), expected)


def test_svc_with_a_floor_above_every_coefficient_scales_all_directions_alike() -> None:
    D = rows(3, 8, 8, seed=3)
    assert close(update("svc", D, alpha=1e6), update("task_arithmetic", D, scale=1.0) / 1e6)


# --- KnOTS


@pytest.mark.parametrize("space", ["V", "SV"])
def test_knots_around_a_linear_method_changes_nothing(space: str) -> None:
    D = rows(3, 9, 14, seed=4)
    found = update("knots", D, inner="task_arithmetic", inner_options={"scale": 1.0}, space=space)
    assert close(found, update("task_arithmetic", D, scale=1.0), 1e-8)


def test_knots_in_space_v_is_its_formula() -> None:
    D = rows(3, 8, 11, seed=5)
    U, s, Vh = torch.linalg.svd(torch.cat(list(D), 1), full_matrices=False)
    V = torch.stack(Vh.split(11, 1))
    inner = update("ties", V, density=0.4)
    assert close(update("knots", D, inner_options={"density": 0.4}), (U * s) @ inner, 1e-8)


def test_knots_does_not_depend_on_the_basis_of_outputs() -> None:
    D = rows(3, 8, 11, seed=6)
    Q, _ = torch.linalg.qr(rows(8, 8, seed=7))
    assert close(update("knots", Q @ D), Q @ update("knots", D), 1e-8)
    assert not close(update("ties", Q @ D), Q @ update("ties", D), 1e-2)


def test_knots_keeps_low_rank() -> None:
    D = torch.stack([rows(20, 2, seed=t) @ rows(2, 15, seed=t + 10) for t in range(3)])
    assert int(torch.linalg.matrix_rank(update("knots", D), rtol=1e-6)) <= 6


# --- PCB


def test_pcb_is_its_formula() -> None:
    D = rows(3, 5, 6, seed=8)
    x = D.view(3, -1)

    def n(v: Tensor) -> Tensor:
        return (v - v.min()) / (v.max() - v.min())

    weights = []
    for t in range(3):
        beta = torch.exp(3 * n(x[t].abs()) ** 2) * torch.tanh(x[t] * x.sum(0))
        theta = beta.sort().values[30 - 9 - 1]
        weights.append(n(beta.clamp_min(float(theta))))
    w = torch.stack(weights)
    total = w.sum(0)
    expected = torch.where(total > 0, (w * x).sum(0) / torch.where(total > 0, total, 1.0), 0.0)
    assert close(update("pcb", D, density=0.3), expected.view(5, 6))


def test_pcb_lets_disagreement_lose() -> None:
    D = torch.tensor([[[2.0, 1.0, 0.1, 0.1]], [[-1.0, 1.2, 0.1, 0.1]], [[-1.0, 1.1, 0.1, 0.1]]], dtype=torch.float64)
    found = update("pcb", D, density=0.25)[0]
    # nobody agrees on the first entry (its sum is 0): the second wins for all who keep one
    assert found[0] == 0
    assert 1.0 <= found[1] <= 1.2


# --- both


@pytest.mark.parametrize("name", ["svc", "knots"])
def test_methods_that_cannot_stand_inside_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="works around a method that merges task vectors, not average"):
        make(name, inner="average")
    with pytest.raises(InputError, match="there is no merging method called 'nonsense'"):
        make(name, inner="nonsense")
    with pytest.raises(InputError, match="look at one tensor at a time, not ties"):
        make(name, inner="ties", inner_options={"scope": "model"})

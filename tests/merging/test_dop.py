"""DOP against autograd, and what it holds on to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import make
from polytask.merging.dop import share_of_first

from .test_oracles import close, of, rows


def measure(X: Tensor, tau: Tensor, space: str = "uv") -> Tensor:
    """The losses by singular vectors, none of which is left out."""
    U, S, Vh = torch.linalg.svd(tau, full_matrices=False)
    E = X - tau
    left, right = (torch.diag(S) @ U.T @ E).square().sum(), (E @ Vh.T @ torch.diag(S)).square().sum()
    return left * ("u" in space) + right * ("v" in space)


def by_autograd(D: Tensor, steps: int, rate: float, a: float, beta: float, space: str) -> Tensor:
    merged = D[0]
    for tau in D[1:]:
        X = ((merged + tau) / 2).requires_grad_()
        optimizer, share = torch.optim.Adam([X], lr=rate), a
        for _ in range(steps):
            losses = [measure(X, old, space) for old in (merged, tau)]
            g, h = (torch.autograd.grad(loss, X)[0] / loss.detach() for loss in losses)
            grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
            squares = (
                grid**2 * g.square().sum() + 2 * grid * (1 - grid) * (g * h).sum() + (1 - grid) ** 2 * h.square().sum()
            )
            share = beta * share + (1 - beta) * float(grid[squares.argmin()])
            optimizer.zero_grad()
            (share * measure(X, merged, space) + (1 - share) * measure(X, tau, space)).backward()
            optimizer.step()
        merged = X.detach()
    return merged


@pytest.mark.parametrize("space", ["uv", "u", "v"])
@pytest.mark.parametrize("momentum", [1.0, 0.6])
def test_it_is_the_descent_by_autograd(space: str, momentum: float) -> None:
    W0, D = rows(6, 9), rows(3, 6, 9, seed=1)
    options = {"steps": 20, "learning_rate": 1e-2, "momentum": momentum, "space": space, "energy": 1.0}
    found = of("dop", W0, W0 + D, **options) - W0
    # the weights of the second are found on a grid
    assert close(found, by_autograd(D, 20, 1e-2, 0.8, momentum, space), 1e-9 if momentum == 1 else 1e-5)


def test_the_optimum_of_one_side_is_known() -> None:
    D = rows(2, 6, 5, seed=1)
    A = [d.T @ d for d in D]
    # a tr E1 A1 E1' + (1 - a) tr E2 A2 E2' is least where X (a A1 + (1 - a) A2) = a D1 A1 + (1 - a) D2 A2
    optimum = (0.8 * D[0] @ A[0] + 0.2 * D[1] @ A[1]) @ torch.linalg.inv(0.8 * A[0] + 0.2 * A[1])
    found = of("dop", torch.zeros(6, 5).double(), D, space="v", momentum=1.0, steps=4000, learning_rate=3e-3)
    assert close(found, optimum, 1e-3)


def test_without_steps_it_is_a_running_mean() -> None:
    D = rows(3, 6, 5, seed=2)
    assert close(of("dop", torch.zeros(6, 5).double(), D, steps=0), D[0] / 4 + D[1] / 4 + D[2] / 2)
    assert close(of("dop", torch.zeros(6).double(), D[:, :, 0]), D[0, :, 0] / 4 + D[1, :, 0] / 4 + D[2, :, 0] / 2)


def test_only_the_leading_directions_count() -> None:
    U, V = torch.linalg.qr(rows(8, 8))[0], torch.linalg.qr(rows(6, 6, seed=1))[0]
    S = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.25]).double()
    tau = U[:, :6] * S @ V.T
    for energy, r in ((0.4, 1), (0.74, 2), (0.76, 3), (1.0, 6)):
        P, Q = make("dop", energy=energy).projections(tau)  # type: ignore[attr-defined]
        assert close(P @ P.T, U[:, :r] * S[:r] ** 2 @ U[:, :r].T)
        assert close(Q @ Q.T, V[:, :r] * S[:r] ** 2 @ V[:, :r].T)


def test_the_shortest_combination_of_two() -> None:
    for g, h, expected in (
        ([1.0, 0.0], [0.0, 1.0], 0.5),
        ([1.0, 0.0], [3.0, 0.0], 1.0),
        ([3.0, 0.0], [1.0, 0.0], 0.0),
        ([2.0, 0.0], [-1.0, 0.0], 1 / 3),
        ([0.0, 0.0], [0.0, 0.0], 0.5),
    ):
        products = [float(torch.tensor(a) @ torch.tensor(b)) for a, b in ((g, g), (g, h), (h, h))]
        assert share_of_first(*products) == pytest.approx(expected)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_any_size(size: float) -> None:
    W0, D = torch.zeros(6, 5), size * rows(2, 6, 5, dtype=torch.float32)
    assert torch.equal(of("dop", W0, D[:1]), D[0])
    assert torch.equal(of("dop", W0, D[:1].repeat(3, 1, 1)), D[0])
    for zeros in (torch.cat([D, torch.zeros_like(D)]), torch.zeros_like(D)):
        assert bool(torch.isfinite(of("dop", W0, zeros)).all())
    # far larger than Adam's steps are long: nothing moves from the mean
    if size == 1e8:
        assert close(of("dop", W0, D), D.mean(0), 1e-6)


def test_refusals() -> None:
    for options, said in (
        ({"stability": 2.0}, "stability of dop"),
        ({"momentum": -0.1}, "momentum of dop"),
        ({"energy": 1.1}, "energy of dop"),
        ({"space": "w"}, "'uv', 'u' or 'v'"),
        ({"steps": -1}, "steps >= 0"),
    ):
        with pytest.raises(InputError, match=said):
            make("dop", **options)

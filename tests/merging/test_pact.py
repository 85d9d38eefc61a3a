"""PACT and SIFT: what their specification says holds exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import Place, make_filter, merge
from polytask.merging.pact import PACT, hidden_interference, intrusion, reliance_space, similarity
from polytask.merging.sift import SIFT
from polytask.merging.subspaces import orthonormal, rank_for_energy, right_basis, without

PLACE = Place("layer.weight")
M, N = 30, 40


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(numbers(n, n, seed=seed))[0]


def filtered(W0: Tensor, D: Tensor, **options: object) -> Tensor:
    chosen = {"core_ratio": 0.2, "task_rank": 4} | options
    return make_filter("pact", **chosen).apply(W0, D.clone(), PLACE)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


W0, D = numbers(M, N), numbers(3, M, N, seed=1)


def test_nothing_is_left_on_what_the_others_rely_on() -> None:
    pact = PACT(core_ratio=0.2, task_rank=4)
    R, P = pact.reliance(W0, D, PLACE), pact.protected(W0, D, PLACE)
    found = filtered(W0, D)
    for j in range(3):
        assert close(P[j].T @ P[j], torch.eye(P[j].shape[1]).double(), 1e-12)
        for t in range(3):
            left = float((found[j] @ R[t]).norm() / D[j].norm())
            assert left < 1e-8 if t != j else left > 1e-3
        assert found[j].norm() < D[j].norm()
        assert close(without(found[j], P[j]), found[j], 1e-12)
        # a load-bearing direction of t only feels t's own update
        a = (0.3, -2.0, 1.7)
        merged = W0 + sum(a_j * d for a_j, d in zip(a, found, strict=True))
        assert close(merged @ R[j], (W0 + a[j] * found[j]) @ R[j])


def test_identities() -> None:
    assert torch.equal(filtered(W0, D[:1]), D[:1])
    assert torch.equal(filtered(W0, D, core_ratio=0.0), D)
    assert torch.equal(filtered(W0, D, exclude="layer*"), D)
    assert torch.equal(filtered(W0, D, include=["head*"]), D)
    bias = numbers(3, M, seed=3)
    assert torch.equal(make_filter("pact").apply(numbers(M), bias.clone(), PLACE), bias)
    # whoever rewrote the whole core relies on none of it
    V0 = right_basis(W0, 6)
    rewriting = torch.stack([numbers(M, 6, seed=t) @ V0.T for t in range(3)])
    assert close(filtered(W0, rewriting, task_rank=6), rewriting)


def test_sift_is_pact_where_tasks_rewrote_nothing() -> None:
    expected = SIFT(core_ratio=0.2).apply(W0, D.clone(), PLACE)
    assert close(filtered(W0, D, task_rank=0), expected)
    V0 = torch.linalg.svd(W0)[2][:6].T
    assert close(expected, D - D @ V0 @ V0.T)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_scales_and_rotations(seed: int, c: list[float]) -> None:
    W0, D = numbers(M, N, seed=seed), numbers(3, M, N, seed=seed + 1)
    plain = filtered(W0, D)
    factors = torch.tensor(c).double()[:, None, None]
    assert close(filtered(W0, factors * D), factors * plain)
    Q, R = rotation(M, seed + 2), rotation(N, seed + 3)
    assert close(filtered(Q @ W0 @ R, Q @ D @ R), Q @ plain @ R)
    assert close(filtered(W0, Q @ D), Q @ plain)


def test_by_full_svds() -> None:
    V0 = torch.linalg.svd(W0)[2][:6].T
    V = [torch.linalg.svd(d)[2][:4].T for d in D]
    R = [torch.linalg.qr(V0 - v @ v.T @ V0)[0] for v in V]
    for j in range(3):
        both = torch.cat([R[t] for t in range(3) if t != j], 1)
        P = torch.linalg.svd(both, full_matrices=False)[0][:, : torch.linalg.matrix_rank(both, rtol=1e-6)]
        assert close(filtered(W0, D)[j], D[j] - D[j] @ P @ P.T)
        Q = torch.linalg.qr(both)[0]
        assert close(filtered(W0, D, orth="qr")[j], D[j] - D[j] @ Q @ Q.T)


def test_blocks_that_coincide_take_one_room() -> None:
    # plain QR makes full room for directions that are but rounding apart
    V0 = right_basis(W0, 6)
    twin = torch.cat([V0, orthonormal(V0 + 1e-12 * numbers(N, 6, seed=5))], 1)
    assert orthonormal(twin).shape[1] == 6


@pytest.mark.parametrize("orth", ["svd", "qr"])
def test_the_ratio_that_was_shipped_is_refused(orth: str) -> None:
    tall, D = numbers(64, 64), 0.1 * numbers(3, 64, 64, seed=1)
    with pytest.raises(InputError, match=r"expert 1 off 64 of the 64 input directions of layer\.weight"):
        filtered(tall, D, core_ratio=0.8, task_rank=10, orth=orth)
    assert float(filtered(tall, D[:2], core_ratio=0.8, task_rank=10, orth=orth).norm()) > 0.1 * float(D[:2].norm())
    base, experts = {"w": tall}, [{"w": tall + d} for d in D]
    with pytest.raises(InputError, match="take a smaller core_ratio"):
        merge(base, experts, "iso_c", filters=[make_filter("pact", core_ratio=0.8)])


def test_adapters_stay_adapters() -> None:
    A, B = numbers(3, 4, N, seed=6), numbers(3, M, 4, seed=7)
    pact = PACT(core_ratio=0.2, task_rank=4)
    factors = pact.apply_to_adapters(W0, list(A), PLACE)
    assert close(B @ torch.stack(factors), filtered(W0, B @ A))


def test_adaptive_ranks_hold_their_energy() -> None:
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]).double())
    assert [rank_for_energy(A, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(0 * A, 0.5) == 0
    lowrank = numbers(M, 3, seed=1) @ numbers(3, N, seed=2)
    tau = torch.stack([D[0], D[0] @ rotation(N, 8)])
    k = rank_for_energy(tau[0], 0.99)
    sizes = {"core_energy": 1.0, "task_energy": 0.99, "core_ratio": 0.1, "task_rank": k}
    both = [filtered(lowrank, tau, ranks=r, **sizes) for r in ("adaptive", "fixed")]
    assert close(*both)


def test_the_randomised_decomposition_is_close_and_repeatable() -> None:
    decaying = rotation(M, 1)[:, :20] * 0.5 ** torch.arange(20).double() @ rotation(N, 2)[:20]
    steep = torch.stack([rotation(M, 3 + t) @ decaying @ rotation(N, 9 + t) for t in range(3)])
    exact, first, second = (filtered(decaying, steep, svd=s) for s in ("exact", "randomized", "randomized"))
    assert torch.equal(first, second)
    assert close(first, exact, 0.01)
    assert close(right_basis(decaying, 5).T @ right_basis(decaying, 5), torch.eye(5).double(), 1e-12)


def test_the_first_layers_only() -> None:
    names = ["a", "b", "c", "d"]
    base = {n: numbers(M, N, seed=i) for i, n in enumerate(names)} | {"bias": numbers(M)}
    experts = [{n: v + numbers(*v.shape, seed=100 + t) for n, v in base.items()} for t in range(3)]
    plain = merge(base, experts, "task_arithmetic")
    half = merge(base, experts, "task_arithmetic", filters=[make_filter("pact", layer_ratio=0.5)])
    assert [torch.equal(plain[n], half[n]) for n in (*names, "bias")] == [False, False, True, True, True]


def test_diagnostics() -> None:
    basis = rotation(N, 4)
    V0, V = basis[:, :6], basis[:, 4:8]
    R = reliance_space(V0, V)
    assert R.shape[1] == 4
    assert similarity(R, basis[:, :4]) == pytest.approx(1.0)
    assert similarity(R, basis[:, 20:]) == pytest.approx(0.0, abs=1e-12)
    assert hidden_interference(basis[:, 3:5], R) == pytest.approx(0.5)
    assert intrusion(numbers(M, 4, seed=1) @ R.T, R) == pytest.approx(1.0)
    assert intrusion(D[0], R) == pytest.approx(float((D[0] @ R).norm() / D[0].norm()) ** 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"core_ratio": 1.2}, "core_ratio of pact"),
        ({"orth": "lu"}, "'svd' or 'qr', not 'lu'"),
        ({"task_rank": -1}, "task_rank"),
    ],
)
def test_options_are_checked(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_filter("pact", **options)

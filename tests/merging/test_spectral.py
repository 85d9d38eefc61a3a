"""Spectral blocks of large matrices: found in float32 where that is close enough, in float64 where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polytask.merging import make, merge
from polytask.merging import spectral as module
from polytask.merging.esd import _between, _in_float32, esd
from polytask.merging.esm import ESM
from polytask.merging.spectral import (
    LEAK,
    NEGLIGIBLE,
    ROWS,
    SMALL,
    in_doubt,
    leading_triplets,
    polar,
    polar_factors,
    product,
    small_gramian,
)

LARGE = SMALL + 44
FLAT, STEEP = -0.5, -3.0


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(m: int, n: int, power: float, seed: int = 0) -> Tensor:
    """A float32 matrix whose i-th singular value is i ** power."""
    k = min(m, n)
    U, V = (torch.linalg.qr(numbers(d, k, seed=seed + i))[0] for i, d in enumerate((m, n)))
    return (U * torch.arange(1, k + 1, dtype=torch.float64) ** power @ V.T).float()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def truncated(A: Tensor, k: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return U[:, :k] * s[:k] @ Vh[:k]


@pytest.mark.parametrize(("m", "n"), [(LARGE, LARGE), (LARGE + 200, LARGE), (LARGE, LARGE + 200)])
@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1.0, 1e8, 1e25])
def test_triplets_of_a_large_matrix_are_those_of_its_svd(m: int, n: int, scale: float) -> None:
    A = scale * spectrum(m, n, FLAT)
    U, s, Vh = leading_triplets(A, 40, torch.float64)
    assert off(U * s @ Vh, truncated(A, 40)) < LEAK
    assert off(s, torch.linalg.svdvals(A.double())[:40]) < LEAK**2
    for Q in (U.T @ U, Vh @ Vh.T):
        assert off(Q, torch.eye(40).double()) < 1e-8
    assert leading_triplets(A, 40)[0].dtype == torch.float32


@pytest.mark.parametrize("power", [FLAT, -2.0, STEEP])
def test_float32_is_believed_only_where_its_leak_is_small(power: float) -> None:
    A = spectrum(LARGE, LARGE, power)
    mended = module._mended(A, 30)
    assert (mended is None) == (power < -1)
    U, s, Vh = leading_triplets(A, 30, torch.float64)
    assert off(U * s @ Vh, truncated(A, 30)) < LEAK
    if mended is not None:
        V = torch.linalg.svd(A.double())[2][:30]
        outside = (mended[1] - V.T @ (V @ mended[1])).norm() / 30**0.5
        assert float(outside) < 2 * LEAK


def test_a_rank_below_the_one_asked_for_is_kept() -> None:
    A = (numbers(LARGE, 7) @ numbers(7, LARGE, seed=1)).float()
    U, s, Vh = leading_triplets(A, 40)
    assert len(s) < 12  # seven, and what rounding to float32 adds at the level of noise
    assert off(U * s @ Vh, A.double()) < 1e-5
    assert not len(leading_triplets(torch.zeros(LARGE, LARGE), 40)[1])


def test_a_gramian_is_summed_over_the_long_side() -> None:
    for m, n in ((5, 700), (700, 5), (300, 300), (0, 4), (4, 0)):
        A = numbers(m, n)
        exact = A.T @ A if m >= n else A @ A.T
        assert torch.allclose(small_gramian(A), exact, rtol=1e-12, atol=1e-10)
        assert torch.allclose(small_gramian(A.T.contiguous().T), exact, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30), (20, 20)])
def test_the_polar_factor_is_that_of_the_svd(m: int, n: int) -> None:
    A = numbers(m, n)
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    factor, found = polar(A)
    assert off(factor, U @ Vh) < 1e-9
    assert off(found.flip(0), s) < 1e-9
    assert polar(A, torch.float32)[0].dtype == torch.float32
    assert off(polar(A, torch.float32)[0], U @ Vh) < 1e-6


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1.0, 1e8, 1e25])
@pytest.mark.parametrize(("power", "rank"), [(-0.4, LARGE), (-1.5, LARGE), (-0.4, 200)])
def test_a_long_stack_is_whitened_in_float32_only_where_well_conditioned(scale: float, power: float, rank: int) -> None:
    U, V = (torch.linalg.qr(numbers(d, LARGE, seed=i))[0][:, :rank] for i, d in enumerate((3 * LARGE, LARGE)))
    s = scale * torch.arange(1, rank + 1, dtype=torch.float64) ** power
    A, expected = (U * s @ V.T).float(), U @ V.T
    # what float32 cannot hold the squares of is left to float64, as is what is ill-conditioned
    assert (module._whitening(A) is None) == (power < -1 or rank < LARGE or not 1e-20 < scale < 1e20)
    for stack, polar_factor in ((A, expected), (A.T, expected.T)):
        left, found, right = polar_factors(stack)
        assert off(found.flip(0)[:rank], s) < LEAK
        # what is ill-conditioned, rounding the stack to float32 moves by more
        assert off(left @ right, polar_factor) < (LEAK if power > -1 else 1e-3)
        assert off(left @ right, polar(stack.double())[0]) < (LEAK if power > -1 else 1e-4)


@pytest.mark.parametrize(("m", "n"), [(40, 3 * ROWS + 7), (ROWS + 9, 50), (30, ROWS), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_a_congruence_reads_one_triangle(m: int, n: int, dtype: torch.dtype, tolerance: float) -> None:
    delta, X = numbers(m, n).to(dtype), numbers(n // 2 + 1, n + 1, seed=1)
    G = (X.T @ X)[:-1, :-1]
    before = G.clone()
    found = _between(delta, G)
    assert off(found, delta.double() @ G @ delta.double().T) < tolerance
    assert torch.equal(found, found.T)
    assert torch.equal(G, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_that_of_the_formula_however_its_factors_lie_in_memory(dtype: torch.dtype) -> None:
    A, B = numbers(70, 90).to(dtype), numbers(110, 90, seed=1).to(dtype)
    for X, Y in ((A, B), (A[::2], B), (A, B.T.contiguous().T), (A[:, 10:40], B[:, 10:40]), (A[:1], B[:1])):
        assert off(product(X, Y), X.double() @ Y.double().T) < (1e-6 if dtype == torch.float32 else 1e-14)
    assert product(A[:0], B).shape == (0, 110)
    assert torch.equal(product(A[:, :0], B[:, :0]), torch.zeros(70, 110, dtype=dtype))


def experts(m: int, n: int, count: int = 3) -> Tensor:
    return torch.stack([spectrum(m, n, FLAT, seed=10 * t) for t in range(count)])


def test_large_layers_merge_as_in_float64() -> None:
    D = experts(LARGE, LARGE + 50)
    base = torch.zeros(D.shape[1:])
    found = merge({"w": base}, [{"w": d} for d in D], "tsv_m")["w"]
    expected = merge({"w": base.double()}, [{"w": d.double()} for d in D], "tsv_m")["w"]
    assert off(found, expected) < 1e-4
    X = [numbers(400, LARGE + 51, seed=t) for t in range(3)]
    S = [x.T @ x for x in X]
    assert off(ESM().layer(D, S), ESM().layer(D.double(), S)) < 1e-4


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_movements_in_float32_are_believed_only_where_their_leak_is_small(scale: float) -> None:
    n = LARGE + 100
    X = numbers(500, n) @ numbers(n, n, seed=1)
    G, delta = scale * X.T @ X, scale * spectrum(LARGE, n, FLAT)
    s, U, V = esd(delta, G, 30)
    exact = esd(delta, G, 30, exact=True)
    assert off(U @ V, exact[1] @ exact[2]) < LEAK
    assert off(s, exact[0]) < LEAK
    assert _in_float32(delta, G, 30) is not None
    steep = spectrum(LARGE, n, STEEP)
    assert _in_float32(steep, G, 30) is None
    s, U, V = esd(steep, G, 30)
    assert off(s, torch.linalg.svdvals(X @ steep.T.double())[:30] * scale**0.5) < 1e-6
    assert _in_float32(0 * delta, G, 30) is None
    assert _in_float32(delta, 0 * G, 30) is None


def test_directions_that_experts_share_are_told_apart_in_float64() -> None:
    A = spectrum(LARGE, LARGE, FLAT)
    rest = experts(LARGE, LARGE)[1:]
    # multiples of one update are the same directions to float64, and nearly the same ones to float32
    D = torch.stack([A, 3 * A, *rest])
    U = torch.cat([leading_triplets(d, 70, torch.float64, exact=True)[0] for d in D], 1)
    s = polar(U)[1]
    assert in_doubt(s)
    assert int((s < NEGLIGIBLE * s.max()).sum()) == 70
    assert not in_doubt(polar(torch.cat([U[:, :70], U[:, 140:]], 1))[1])
    base = torch.zeros(LARGE, LARGE)
    found = make("tsv_m").update_matrix(base, D.clone(), None)  # type: ignore[attr-defined]
    expected = make("tsv_m").update_matrix(base.double(), D.double(), None)  # type: ignore[attr-defined]
    assert off(found, expected) < 1e-4

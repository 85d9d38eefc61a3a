"""Essential subspace decomposition and merging: what their specification says holds exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polytask.merging import Place, make, merge
from polytask.merging.esd import esd
from polytask.merging.esm import ESM
from polytask.merging.spectral import polar

State = dict[str, Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistic(X: Tensor) -> Tensor:
    ones = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    return ones.T @ ones


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


def family(T: int, m: int, n: int, rows: int = 60) -> tuple[Tensor, list[Tensor]]:
    return numbers(T, m, n, seed=1), [numbers(rows, n, seed=10 + t) @ numbers(n, n, seed=30 + t) for t in range(T)]


def released(D: Tensor, X: list[Tensor], p: float = 2, q: float = 0.15, gain: float = 2) -> Tensor:
    """The published formula on activations, by full SVDs."""

    def polar(M: Tensor) -> Tensor:
        P, S, Q = torch.linalg.svd(M, full_matrices=False)
        return P @ Q * S.mean()

    k = D.shape[1] // len(D)
    parts = []
    for delta, x in zip(D, X, strict=True):
        _, s, vh = torch.linalg.svd(x @ delta.T)
        parts.append((s.square() / (len(x) - 1), vh.T, vh @ delta))
    norm = torch.stack([V.norm() for *_, V in parts])
    left, right = [], []
    for (lam, U, V), nu in zip(parts, norm, strict=True):
        w = (lam[:k] / lam[:k].mean()) ** q
        w = w / w.mean()
        left.append(U[:, :k] * w)
        right.append(V[:k] * w[:, None] * nu**p / norm.mean() ** p)
    V = torch.cat(right)
    c = V.norm(dim=0)
    return polar(torch.cat(left, 1)) @ polar(V * (c / c.mean()) ** p) * gain


@pytest.mark.parametrize(("m", "n"), [(24, 16), (16, 24), (20, 20)])
@pytest.mark.parametrize("branch", [{}, {"power": 0.0, "gain": 1.0}])
def test_a_layer_is_the_released_formula(m: int, n: int, branch: dict[str, float]) -> None:
    D, X = family(4, m, n)
    expected = released(D, X, p=branch.get("power", 2.0), gain=branch.get("gain", 2.0))
    found = ESM(**branch).layer(D, [statistic(x) for x in X])
    assert close(found, expected)
    # float32 weights stay within 1e-4 of the exact formula
    assert close(ESM(**branch).layer(D.float(), [statistic(x) for x in X]).double(), expected, 1e-4)


@pytest.mark.parametrize(("m", "n"), [(24, 16), (16, 24)])
def test_the_truncation_is_the_best_on_the_inputs(m: int, n: int) -> None:
    (delta,), (X,) = family(1, m, n)
    s_all = torch.linalg.svdvals(X @ delta.T)
    s, U, V = esd(delta, X.T @ X, min(m, n))
    assert close(s, s_all[: len(s)])
    assert close(U @ V, delta)
    assert close(U.T @ U, torch.eye(min(m, n)).double(), 1e-12)
    Us, Ss, Vs = torch.linalg.svd(delta, full_matrices=False)
    for k in (1, 4, 9):
        _, U, V = esd(delta, X.T @ X, k)
        error = float((X @ (delta - U @ V).T).norm())
        assert error == pytest.approx(float(s_all[k:].square().sum().sqrt()), rel=1e-9)
        svd = Us[:, :k] * Ss[:k] @ Vs[:k]
        drawn = numbers(m, k, seed=k)
        drawn = drawn @ torch.linalg.lstsq(drawn, delta).solution
        assert error < min(float((X @ (delta - other).T).norm()) for other in (svd, drawn))


def test_white_inputs_give_the_svd() -> None:
    delta = numbers(12, 9)
    _, U, V = esd(delta, 7.0 * torch.eye(9).double(), 4)
    P, S, Q = torch.linalg.svd(delta)
    assert close(U @ V, P[:, :4] * S[:4] @ Q[:4])


def test_no_directions_beyond_what_was_seen() -> None:
    delta, X = numbers(12, 9), numbers(3, 9, seed=1)
    s, U, V = esd(delta, X.T @ X, 8)
    assert len(s) == U.shape[1] == len(V) == 3
    D, few = numbers(2, 12, 9, seed=2), [statistic(numbers(3, 9, seed=5 + t)) for t in range(2)]
    found = ESM().layer(D, few)
    assert bool(torch.isfinite(found).all())
    assert int(torch.linalg.matrix_rank(found)) == 6
    # and no movement at all is no update
    assert not ESM().layer(0 * D, few).any()


def scaled_polar(A: Tensor) -> Tensor:
    direction, s = polar(A)
    return direction * s.mean()


def test_one_expert_keeps_directions_not_magnitudes() -> None:
    (delta,), (X,) = family(1, 10, 14)
    found = ESM(power=0.0, spread=0.0, gain=1.0).layer(delta[None], [statistic(X)])
    _, U, V = esd(delta, X.T @ X, 10)
    assert close(found, scaled_polar(U) @ scaled_polar(V))
    assert close(scaled_polar(U), U)
    assert not close(found, delta, 0.1)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 40.0])
def test_scaling_all_updates_scales_the_merge(factor: float) -> None:
    D, X = family(3, 12, 10)
    S = [statistic(x) for x in X]
    assert close(ESM().layer(factor * D, S), factor * ESM().layer(D, S))
    assert close(ESM().layer(D[[2, 0, 1]], [S[2], S[0], S[1]]), ESM().layer(D, S))
    # any multiple of a Gramian gives the same directions
    assert close(ESM().layer(D, [5 * s for s in S]), ESM().layer(D, S))


def stack(scale: float) -> tuple[State, list[State], list[State]]:
    shapes = {f"blocks.{i}.fc.weight": (8, 6) for i in range(3)} | {"blocks.0.fc.bias": (8,), "out.weight": (6, 8)}
    base = {n: numbers(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    experts = [
        {n: v + scale * (1 + i) * numbers(*v.shape, seed=100 * (t + 1) + i) for i, (n, v) in enumerate(base.items())}
        for t in range(2)
    ]
    seen = [{n: statistic(numbers(30, s[1], seed=7 + t)) for n, s in shapes.items() if "fc.w" in n} for t in range(2)]
    return base, experts, seen


def test_layers_of_one_role_are_weighed_against_one_another() -> None:
    base, experts, seen = stack(0.1)
    fc = [n for n in base if "fc.weight" in n]
    plain = merge(base, experts, "esm", statistics=seen, layer_power=0.0)
    found = merge(base, experts, "esm", statistics=seen)
    norms = {n: (plain[n] - base[n]).norm() for n in fc}
    mean = sum(norms.values()) / 3
    for n in fc:
        assert close(found[n] - base[n], (plain[n] - base[n]) * (norms[n] / mean) ** 2)
    # the scale is for what was decomposed; the rest is TSV-M and the mean, whatever the scale
    half = merge(base, experts, "esm", statistics=seen, scale=0.5)
    assert close(half[fc[1]] - base[fc[1]], 0.5 * (found[fc[1]] - base[fc[1]]))
    tsv = merge(base, experts, "tsv_m")
    for n in set(base) - set(fc):
        assert torch.equal(half[n], tsv[n])


def test_a_text_projection_is_averaged() -> None:
    D = numbers(2, 5, 6)
    found = make("esm").merge(numbers(5, 6) * 0, D.clone(), Place("text_projection"))
    assert close(found, D.mean(0))

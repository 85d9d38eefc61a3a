"""Each method against its formula written down naively, and against PEFT's functions where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import gather_fisher, make, make_filter, merge
from polytask.merging.base import Place
from polytask.merging.magnitudes import FEW, Census, kth_largest_magnitude
from polytask.merging.spectral import leading_triplets, polar

from .conftest import distance, family

PLACE = Place("w")


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of(name: str, W0: Tensor, W: Tensor, **options: object) -> Tensor:
    return merge({"w": W0}, [{"w": w} for w in W], name, **options)["w"]  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor, relative: float = 1e-9) -> bool:
    return float((found - expected).norm()) <= relative * float(expected.norm())


# --- against PEFT


@pytest.mark.parametrize("density", [0.2, 0.5, 0.91])
def test_ties_is_peft_s(density: float) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    W0, W = rows(20, 30), rows(20, 30) + 0.1 * rows(4, 20, 30, seed=1)
    expected = theirs.ties(list(W - W0), torch.ones(4, dtype=torch.float64), density)
    assert close(of("ties", W0, W, density=density) - W0, expected)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 1.2, -0.4]])
def test_sums_are_peft_s(weights: list[float]) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    W0, W = rows(20, 30), rows(20, 30) + 0.1 * rows(3, 20, 30, seed=1)
    D, w = list(W - W0), torch.tensor(weights, dtype=torch.float64)
    assert close(of("task_arithmetic", W0, W, scale=1.0, weights=weights) - W0, theirs.task_arithmetic(D, w))
    pruned = theirs.magnitude_prune(D, w, 0.3)
    assert close(of("magnitude_prune", W0, W, density=0.3, weights=weights) - W0, pruned)


# --- formulas


def naive_elected(D: Tensor, w: list[float], normalize: bool) -> Tensor:
    out = torch.zeros_like(D[0])
    for i in range(D[0].numel()):
        entries = [wt * float(d.view(-1)[i]) for wt, d in zip(w, D, strict=True)]
        sign = 1 if sum(entries) >= 0 else -1
        kept = [(e, wt) for e, wt in zip(entries, w, strict=True) if e * sign > 0]
        total, below = sum(e for e, _ in kept), sum(wt for _, wt in kept)
        out.view(-1)[i] = total / (below if normalize and abs(below) > 1e-8 else 1)
    return out


def naive_trim(d: Tensor, density: float) -> Tensor:
    order = d.abs().view(-1).argsort(descending=True)
    kept = torch.zeros(d.numel(), dtype=torch.bool)
    kept[order[: int(density * d.numel())]] = True
    return d * kept.view(d.shape)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0], [1.0, -0.5, 0.2]])
def test_ties_entry_by_entry(weights: list[float]) -> None:
    W0, D = rows(7, 9), rows(3, 7, 9, seed=1)
    densities = [0.5, 0.3, 0.8]
    expected = naive_elected(torch.stack([naive_trim(d, r) for d, r in zip(D, densities, strict=True)]), weights, True)
    assert close(of("ties", W0, W0 + D, density=densities, weights=weights) - W0, expected)


def test_trimming_the_whole_model_as_the_paper_does() -> None:
    base, experts = family(3)
    names = [n for n, v in base.items() if v.is_floating_point()]
    joined = torch.stack([torch.cat([(e[n] - base[n]).view(-1) for n in names]) for e in experts])
    expected = naive_elected(torch.stack([naive_trim(d, 0.3) for d in joined]), [1.0] * 3, True)
    found = merge(base, experts, "ties", density=0.3, scope="model")
    assert close(torch.cat([(found[n] - base[n]).view(-1) for n in names]), expected)
    assert distance(merge(base, experts, "ties", density=0.3), found) > 1e-3


def test_dare_drops_a_share_and_keeps_the_expectation() -> None:
    W0 = torch.zeros(300, 400)
    found = of("dare_linear", W0, torch.ones(1, 300, 400), density=0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    # 120 000 draws: six standard deviations
    assert float(found.mean()) == pytest.approx(1.0, abs=6 * math.sqrt(3 / found.numel()))
    both = of("dare_linear", W0, torch.ones(2, 300, 400), density=0.25)
    assert float((both == 8).float().mean()) == pytest.approx(1 / 16, abs=0.01), "experts have masks of their own"


def test_dare_ties_is_dropping_then_the_election() -> None:
    W0, D = rows(6, 8), rows(3, 6, 8, seed=1)
    dropped = make_filter("drop", density=0.6).apply(W0, D.clone(), Place("w"))
    assert 0 < int((dropped == 0).sum()) < D.numel()
    assert close(of("dare_ties", W0, W0 + D, density=0.6) - W0, naive_elected(dropped, [1.0] * 3, False))


def test_magprune_keeps_large_entries_more_often() -> None:
    row = torch.arange(1, 11).double().repeat(20000, 1) * torch.tensor([1, -1] * 5)
    found = make_filter("magprune", density=0.5, epsilon=0.4).apply(row, row[None].clone(), PLACE)[0]
    shares = (found != 0).double().mean(0)
    q = 0.3 + 0.4 * torch.arange(10).double() / 9
    assert torch.allclose(shares, q, atol=0.02)
    kept = found != 0
    assert close(found[kept], (row / q)[kept])


def test_breadcrumbs_leave_out_both_ends() -> None:
    d = torch.tensor([[5.0, -1.0, 3.0, -9.0, 0.5, 2.0, -4.0, 7.0, 0.1, -6.0]])
    found = of("breadcrumbs", torch.zeros_like(d), d[None], density=0.5, gamma=0.2)
    assert found.tolist() == [[5.0, 0.0, 3.0, 0.0, 0.0, 2.0, -4.0, 0.0, 0.0, -6.0]]
    # where both shares exceed one, fewer large ones go
    assert of("breadcrumbs", torch.zeros_like(d), d[None], density=0.9, gamma=0.5).count_nonzero() == 9


def test_sce_step_by_step() -> None:
    W0, D = rows(5, 8), rows(3, 5, 8, seed=1)
    variance = D.var(0, unbiased=False)
    chosen = variance >= variance.view(-1).sort(descending=True).values[int(0.4 * 40) - 1]
    D_ = D * chosen
    w = D_.square().sum((1, 2)) / D_.square().sum()
    majority = torch.where(D_.sum(0) >= 0, 1.0, -1.0)
    agrees = (D_.sign() == majority).double() * w[:, None, None]
    below = agrees.sum(0)
    expected = (agrees * D_).sum(0) / torch.where(below == 0, 1.0, below)
    assert close(of("sce", W0, W0 + D, select=0.4) - W0, expected)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp_on_a_circle(t: float) -> None:
    angle = lambda a: torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64)  # noqa: E731
    assert close(of("slerp", angle(0.3), angle(1.3)[None], t=t), angle(0.3 + t))
    assert close(of("slerp", angle(9.0), torch.stack([angle(0.3), angle(1.3)]), t=t), angle(0.3 + t))


def test_spherical_means_of_two_lie_halfway() -> None:
    a, b = rows(50, seed=1), rows(50, seed=2)
    ends = torch.stack([a / a.norm(), b / b.norm()])
    halfway = (ends[0] + ends[1]) / (ends[0] + ends[1]).norm()
    for name in ("karcher", "multislerp", "slerp"):
        assert close(of(name, a, ends), halfway)


def test_karcher_has_no_mean_tangent() -> None:
    W = rows(4, 30, seed=3) + 0.5
    w = torch.tensor([1.0, 2.0, 0.5, 1.0]).double() / 4.5
    found = of("karcher", W[0], W, weights=[1.0, 2.0, 0.5, 1.0])
    assert float(found.norm()) == pytest.approx(float(w @ W.norm(dim=1)))
    mu, U = found / found.norm(), W / W.norm(dim=1, keepdim=True)
    theta = (U @ mu).arccos()
    tangents = (theta / theta.sin())[:, None] * (U - (U @ mu)[:, None] * mu)
    assert float((w @ tangents).norm()) < 1e-8


@pytest.mark.parametrize("per_row", [False, True])
def test_model_stock_by_pairs(per_row: bool) -> None:
    W0, D = rows(6, 40), rows(6, 40, seed=1) + 0.7 * rows(3, 6, 40, seed=2)
    flat = D if per_row else D.reshape(3, 1, -1)
    pairs = [torch.cosine_similarity(flat[i], flat[j], dim=-1) for i in range(3) for j in range(i)]
    cosine = torch.stack(pairs).mean(0)[:, None]
    expected = (3 * cosine / (1 + 2 * cosine) * flat.mean(0)).view(6, 40)
    assert close(of("model_stock", W0, W0 + D, per_row=per_row) - W0, expected)


def test_tsv_m_by_full_svds() -> None:
    W0, D = rows(30, 16), rows(4, 30, 16, seed=1)
    U, s, V = zip(*(torch.linalg.svd(d, full_matrices=False) for d in D), strict=True)
    stacked = torch.cat([u[:, :4] for u in U], 1), torch.cat([x[:4] for x in s]), torch.cat([v[:4] for v in V])
    (P, _, Q), (R, _, T) = (torch.linalg.svd(m, full_matrices=False) for m in (stacked[0], stacked[2]))
    expected = P @ Q @ torch.diag(stacked[1]) @ R @ T
    for transposed in (False, True):
        a, b, e = (x.mT if transposed else x for x in (W0, D, expected))
        assert close(of("tsv_m", a, a + b) - a, e)
    # the Gramian's side in float32 stays within 1e-4 of the exact formula
    assert close(of("tsv_m", W0.float() * 0, D.float()).double(), expected, 1e-5)


def test_tsv_m_gives_each_copy_its_share() -> None:
    D = rows(1, 12, 10, seed=4)
    U, s, V = torch.linalg.svd(D[0], full_matrices=False)
    assert close(of("tsv_m", torch.zeros(12, 10).double(), D.repeat(2, 1, 1)), U[:, :5] * s[:5] @ V[:5])


def test_iso_c_by_a_full_svd() -> None:
    W0, D = rows(20, 12), rows(3, 20, 12, seed=1)
    U, s, V = torch.linalg.svd(D.sum(0), full_matrices=False)
    assert close(of("iso_c", W0, W0 + D) - W0, s.mean() * U @ V)


def test_iso_cts_by_full_svds() -> None:
    W0, D = rows(20, 12), rows(3, 20, 12, seed=1)
    svd = lambda A: torch.linalg.svd(A, full_matrices=False)  # noqa: E731
    U, s, V = svd(D.sum(0))
    parts = [(U[:, :9], s[:9], V[:9])]
    for d in D:
        u, x, v = svd(d - U[:, :9] @ U[:, :9].T @ d)
        parts.append((u[:, :1], x[:1], v[:1]))
    stacked = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    (P, _, Q), (R, _, T) = svd(stacked[0]), svd(stacked[2])
    assert close(of("iso_cts", W0, W0 + D, common=0.75) - W0, stacked[1].mean() * P @ Q @ R @ T)


def test_consensus_keeps_what_matters_to_two() -> None:
    D = torch.tensor([[1.0, 0.0, 1.0, -1.0], [1.0, 0.0, 0.01, 1.0], [1.0, 0.0, 0.01, 0.2]]).double()
    found = of("consensus", torch.zeros(4).double(), D, threshold=0.4, scale=1.0)
    # agreed by all; moved by none; one expert's own; the third of these is masked by the two others' cancelling out
    assert found[:3].tolist() == [3.0, 0.0, 0.0]
    matters = [abs(d) >= 0.4 * abs(float(D[:, 3].sum()) - d) for d in D[:, 3].tolist()]
    assert float(found[3]) == pytest.approx(0.2 if sum(matters) >= 2 else 0.0)


def test_wudi_descends_to_the_closed_form() -> None:
    D = rows(3, 6, 5, seed=1)
    weight = D.square().sum((1, 2))
    A = sum(d.T @ d / n for d, n in zip(D, weight, strict=True))
    B = sum(d @ d.T @ d / n for d, n in zip(D, weight, strict=True))
    optimum = B @ torch.linalg.inv(A)
    found = of("wudi", torch.zeros(6, 5).double(), D, steps=4000, learning_rate=1e-2)
    assert close(found, optimum, 1e-3)
    # and the objective falls from where it starts
    loss = lambda X: float(sum(((X - d) @ d.T).square().sum() / n for d, n in zip(D, weight, strict=True)))  # noqa: E731
    start, early = D.sum(0), of("wudi", torch.zeros(6, 5).double(), D, steps=30, learning_rate=1e-2)
    assert loss(found) < loss(early) < loss(start)


def test_cart_at_full_rank_adds_whole_departures() -> None:
    W0, D = rows(9, 7), rows(3, 9, 7, seed=1)
    # departures sum to zero: at full rank the mean is left
    assert close(of("cart", W0, W0 + D, rank=1.0) - W0, D.mean(0), 1e-8)
    U, s, V = zip(*(torch.linalg.svd(d - D.mean(0), full_matrices=False) for d in D), strict=True)
    expected = D.mean(0) + sum(u[:, :2] * x[:2] @ v[:2] for u, x, v in zip(U, s, V, strict=True))
    assert close(of("cart", W0, W0 + D, rank=0.25) - W0, expected)


# --- methods that need statistics


def test_regmean_is_the_least_squares_fit() -> None:
    W, X = rows(3, 4, 6, seed=1), [rows(50, 6, seed=10 + t) for t in range(3)]
    ones = [torch.cat([x, torch.ones(50, 1, dtype=x.dtype)], 1) for x in X]
    statistics = [{"w": x.T @ x} for x in ones]
    found = of("regmean", W[0], W, alpha=1.0, statistics=statistics)
    targets = torch.cat([x @ w.T for x, w in zip(X, W, strict=True)])
    assert close(found, torch.linalg.lstsq(torch.cat(X), targets).solution.T, 1e-8)
    # inputs that no expert ever saw leave the mean
    seen = [{"w": torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0, 3])).double()} for _ in W]
    assert close(of("regmean", W[0], W, alpha=1.0, statistics=seen)[:, 3:], W.mean(0)[:, 3:])


def test_fisher_of_logistic_regression_is_known() -> None:
    net = torch.nn.Linear(3, 2).double()
    X = rows(20, 3)
    F = gather_fisher(net, X.split(6))
    p = net(X).softmax(-1).detach()
    # d log p_y / d W_k = ([y = k] - p_k) x, averaged over y drawn from p
    expected = torch.einsum("nk,ni->ki", p * (1 - p), X.square()) / 20
    assert close(F["weight"], expected)
    assert close(F["bias"], (p * (1 - p)).mean(0))


def test_fisher_follows_the_one_that_cares() -> None:
    W = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    statistics = [{"w": torch.tensor([1.0, 3.0]).double()}, {"w": torch.tensor([0.0, 1.0]).double()}]
    found = of("fisher", W[0], W, statistics=statistics)
    assert found.tolist() == pytest.approx([1.0, 1.5], rel=1e-5)


def test_statistics_are_asked_for() -> None:
    base, experts = family(2)
    with pytest.raises(
        InputError, match=r"regmean needs a statistic of each of the 2 experts \(gramian\), and 0 were given"
    ):
        merge(base, experts, "regmean")


# --- blocks


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]), st.floats(0.001, 1.0), st.booleans())
def test_the_kth_largest_is_exact(seed: int, dtype: torch.dtype, share: float, coarse: bool) -> None:
    x = rows(FEW + 1000, seed=seed, dtype=dtype)
    x = (x * 8).round() / 8 if coarse else x * torch.linspace(-30, 30, len(x), dtype=dtype).exp()
    k = max(1, int(share * len(x)))
    assert kth_largest_magnitude(x, k) == float(x.abs().sort(descending=True).values[k - 1])


def test_a_census_in_pieces_sees_one_whole() -> None:
    x = rows(5000, dtype=torch.float32)
    census, k = Census(torch.float32), 321
    while not census.done:
        for piece in (x[:1], x[1:3000], x[3000:]):
            census.see(piece)
        assert census.total <= 5000
        k = census.end_round(k)
    assert census.value == float(x.abs().sort(descending=True).values[320])


@pytest.mark.parametrize("shape", [(40, 13), (13, 40), (20, 20)])
def test_triplets_and_polar_factor(shape: tuple[int, int]) -> None:
    A = rows(*shape, dtype=torch.float32)
    U, s, V = torch.linalg.svd(A.double(), full_matrices=False)
    u, x, v = leading_triplets(A, 5)
    assert close((u * x @ v).double(), U[:, :5] * s[:5] @ V[:5], 1e-5)
    assert close(x.double(), s[:5], 1e-5)
    direction, sigma = polar(A)
    assert close(direction.double(), U @ V, 1e-4)
    assert close(sigma.flip(0).double(), s, 1e-5)


def test_low_rank_has_no_invented_directions() -> None:
    A = torch.outer(rows(9, seed=1), rows(5, seed=2))
    assert len(leading_triplets(A, 4)[1]) == 1
    assert close(polar(A)[0], A / A.norm())
    assert len(leading_triplets(torch.zeros(3, 4), 2)[1]) == 0


def test_ranges_are_checked_when_a_method_is_made() -> None:
    for name, options, said in (
        ("ties", {"density": 0.0}, "density"),
        ("dare_ties", {"density": [0.5, 1.2]}, "density"),
        ("slerp", {"t": 1.5}, "t of slerp"),
        ("slerp", {"t": "half"}, "t of slerp is a number, not 'half'"),
        ("iso_c", {"scale": "large"}, "the scale is a number"),
        ("weighted", {"weights": [1.0, "a"]}, "a weight is a number"),
        ("task_arithmetic", {"weights": float("nan")}, "a weight lies"),
        ("ties", {"scope": "layer"}, "scope"),
        ("karcher", {"steps": 0}, "step"),
        ("consensus", {"agreeing": 0}, "agrees"),
        ("wudi", {"learning_rate": 0.0}, "learning rate"),
    ):
        with pytest.raises(InputError, match=said):
            make(name, **options)

"""Bayesian model merging: limits, optimality, invariances; the search around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from polytask.errors import InputError, TrainingError
from polytask.merging import gather_gramians, make, merge
from polytask.merging.bayesian_search import search
from polytask.merging.engine import Engine
from polytask.merging.on_disk import MergePlan, write
from polytask.merging.posterior import Posterior, own_moment, second_moments
from polytask.merging.proxy import Proxy
from polytask.merging.strengths import Posteriors

from .test_proxy import build, inputs, place  # noqa: F401

T, M, N = 3, 7, 5
State = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistic(X: Tensor) -> Tensor:
    ones = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    return ones.T @ ones


W0, W = draw(M, N), draw(M, N) + 0.3 * draw(T, M, N, seed=1)
INPUTS = [draw(n, N, seed=10 + i) * (1 + i) for i, n in enumerate((40, 20, 30))]
STATISTICS = [{"w": statistic(X)} for X in INPUTS]


def bmm(
    method: str = "bmm", given: Sequence[State] = STATISTICS, experts: Tensor = W, base: Tensor = W0, **options: object
) -> Tensor:
    statistics = given if method == "bmm" else ()
    return merge({"w": base}, [{"w": w} for w in experts], method, statistics=statistics, **options)["w"]  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor, relative: float = 1e-8) -> bool:
    return float((found - expected).norm()) <= relative * float(expected.norm())


def test_it_is_the_minimum_of_the_ridge_objective() -> None:
    anchor = merge({"w": W0}, [{"w": w} for w in W], "task_arithmetic", scale=0.3)["w"]
    G = [X.T @ X / len(X) for X in INPUTS]
    s = sum(G).trace() / N  # type: ignore[union-attr]
    found = bmm(strength=0.4, jitter=0.0, anchor_scale=0.3).requires_grad_(True)
    fit = sum(((found - w) @ g * (found - w)).sum() for w, g in zip(W, G, strict=True))
    (fit + 0.4 * s * (found - anchor).square().sum()).backward()
    assert found.grad is not None
    assert float(found.grad.norm()) < 1e-10 * float(s * found.norm())


def test_its_limits_are_regression_and_the_anchor() -> None:
    G = [X.T @ X / len(X) for X in INPUTS]
    regression = sum(w @ g for w, g in zip(W, G, strict=True)) @ torch.linalg.inv(sum(G))  # type: ignore[arg-type]
    assert close(bmm(strength=0.0, jitter=0.0), regression)
    even = [{"w": s["w"] / s["w"][-1, -1]} for s in STATISTICS]
    assert close(
        bmm(strength=0.0, jitter=0.0),
        merge({"w": W0}, [{"w": w} for w in W], "regmean", statistics=even, alpha=1.0)["w"],
    )
    for anchor, options in (("task_arithmetic", {}), ("ties", {}), ("tsv_m", {}), ("regmean", {}), ("average", {})):
        expected = merge({"w": W0}, [{"w": w} for w in W], anchor, statistics=STATISTICS, **options)["w"]  # type: ignore[arg-type]
        assert close(bmm(strength=1e12, anchor=anchor), expected, 1e-6)
        assert close(bmm(strength=1e12, anchor=make(anchor)), expected, 1e-6)
    assert not close(bmm(strength=0.1), bmm(strength=10.0), 1e-2)


def test_one_expert_comes_back_and_so_do_copies_around_themselves() -> None:
    assert close(bmm(experts=W[:1], given=STATISTICS[:1], strength=0.0, jitter=0.0), W[0])
    for strength in (0.0, 0.1, 10.0):
        assert close(bmm(experts=W[:1].expand(T, M, N), strength=strength, anchor="average"), W[0])


def test_inputs_may_be_rotated_and_gramians_scaled() -> None:
    R = torch.linalg.qr(draw(N, N, seed=5))[0]
    turned = [{"w": statistic(X @ R)} for X in INPUTS]
    assert close(bmm(given=turned, experts=W @ R, base=W0 @ R), bmm() @ R)
    assert close(bmm("bmm_data_free", experts=W @ R, base=W0 @ R, strength=0.3), bmm("bmm_data_free", strength=0.3) @ R)
    copies = [{"w": 7 * s["w"]} for s in STATISTICS]
    assert close(bmm(given=copies), bmm())
    for gram in ("data", "trace", "hybrid"):
        D = W - W0
        kept = dict(
            zip(
                ("S", "R"),
                (
                    Posterior.of(
                        D,
                        [c * g for g in second_moments(D, [s["w"] for s in STATISTICS], gram, bias=False)],
                        [1.0] * T,
                        D.mean(0),
                    ).mean(0.2)
                    for c in (1.0, 9.0)
                ),
                strict=True,
            )
        )  # type: ignore[arg-type]
        assert close(kept["S"], kept["R"])


def test_weights_count_experts_and_scale_is_of_the_whole_update() -> None:
    twice = merge(
        {"w": W0},
        [{"w": W[i]} for i in (0, 0, 1, 2)],
        "bmm",
        statistics=[STATISTICS[i] for i in (0, 0, 1, 2)],
        anchor="average",
        strength=0.0,
    )["w"]
    assert close(bmm(weights=[2.0, 1.0, 1.0], strength=0.0, anchor="average"), twice, 1e-6)
    assert close(bmm(scale=0.5) - W0, 0.5 * (bmm() - W0))


def test_directions_without_inputs_stay_at_the_anchor() -> None:
    flat = [X.clone().index_fill_(1, torch.tensor([0, 3]), 0.0) for X in INPUTS]
    found = bmm(given=[{"w": statistic(X)} for X in flat], strength=0.0)
    anchor = merge({"w": W0}, [{"w": w} for w in W], "task_arithmetic")["w"]
    assert close(found[:, [0, 3]], anchor[:, [0, 3]], 1e-6)
    assert not close(found[:, [1, 2, 4]], anchor[:, [1, 2, 4]], 1e-2)
    nothing = [{"w": torch.zeros(N + 1, N + 1, dtype=torch.float64)} for _ in INPUTS]
    assert close(bmm(given=nothing), anchor)


# --- data-free


def wudi_gradient(X: Tensor, D: Tensor) -> Tensor:
    return sum(2 * (X - d) @ d.T @ d / d.square().sum() for d in D)  # type: ignore[return-value]


def test_without_data_it_is_where_wudi_ends() -> None:
    D = W - W0
    found = bmm("bmm_data_free", strength=0.0, jitter=0.0) - W0
    start = wudi_gradient(D.sum(0), D)
    assert float(wudi_gradient(found, D).norm()) < 1e-8 * float(start.norm())

    def value(X: Tensor) -> float:
        return float(sum(((X - d) @ d.T).square().sum() / d.square().sum() for d in D))

    run = merge({"w": W0}, [{"w": w} for w in W], "wudi", steps=300)["w"] - W0
    assert value(found) <= value(run)


def test_without_data_low_rank_updates_are_fitted_where_they_are() -> None:
    D = draw(T, M, 1, seed=3) @ draw(T, 1, N, seed=4)
    found = bmm("bmm_data_free", experts=W0 + D, strength=0.0) - W0
    assert float(wudi_gradient(found, D).norm()) < 1e-6 * float(wudi_gradient(D.sum(0), D).norm())
    anchor = merge({"w": W0}, [{"w": W0 + d} for d in D], "task_arithmetic")["w"] - W0
    outside = torch.eye(N, dtype=torch.float64) - torch.linalg.pinv(D.flatten(0, 1)) @ D.flatten(0, 1)
    assert close((found - anchor) @ outside + anchor, anchor, 1e-6)


def test_hybrids_lie_between_data_and_none() -> None:
    D = W - W0
    few, many = statistic(INPUTS[0][:2]), statistic(draw(100_000, N, seed=9))
    for S, like in ((many, "trace"), (few, None)):
        (mixed,) = second_moments(D[:1], [S], "hybrid", bias=False)
        (data,) = second_moments(D[:1], [S], "trace", bias=False)
        n = round(float(S[-1, -1]))
        rho = N / (N + n)
        assert torch.allclose(mixed, (1 - rho) * data + rho * own_moment(D[0]))
        assert float(mixed.trace()) == pytest.approx(1)
        assert close(mixed, data, 1e-3) == (like == "trace")


# --- biases, and models as a whole


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(N, M), nn.ReLU(), nn.LayerNorm(M), nn.Linear(M, 4)).double()


def moved(seed: int) -> nn.Sequential:
    model = net(0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.2 * draw(*p.shape, seed=100 * seed + i)
    return model


EXPERTS = [moved(t + 1) for t in range(T)]
GRAMIANS = [gather_gramians(e, [X]) for e, X in zip(EXPERTS, INPUTS, strict=True)]
STATES = [dict(e.state_dict()) for e in EXPERTS]
BASE = dict(net(0).state_dict())


def test_a_bias_is_one_more_column() -> None:
    found = merge(BASE, STATES, "bmm", statistics=GRAMIANS, strength=0.0, jitter=0.0)
    ones = [torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1) / math.sqrt(len(X)) for X in INPUTS]
    both = [torch.cat([s["0.weight"], s["0.bias"][:, None]], 1) for s in STATES]
    answers = torch.cat([X @ w.T for X, w in zip(ones, both, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(ones), answers).solution.T
    assert close(found["0.weight"], expected[:, :-1])
    assert close(found["0.bias"], expected[:, -1])
    anchor = merge(BASE, STATES, "task_arithmetic")
    assert close(found["2.weight"], anchor["2.weight"]), "norms are the anchor's"
    apart = merge(BASE, STATES, "bmm", statistics=GRAMIANS, strength=0.0, jitter=0.0, bias=False)
    assert close(apart["0.bias"], anchor["0.bias"])
    assert not close(apart["0.weight"], found["0.weight"], 1e-3)


@pytest.mark.parametrize("options", [{}, {"anchor": "ties", "strength": 0.02}, {"bias": False, "gram": "hybrid"}])
def test_models_on_disk_merge_as_those_in_memory(
    place: Path,  # noqa: F811
    options: dict[str, object],
) -> None:
    proxy = Proxy(place / "data", f"{place}/net.py:net")
    write(
        MergePlan([place / "cars", place / "digits"], place / "base", "bmm", lambda _: options, proxy=proxy),
        place / "out",
    )
    seen = [gather_gramians(build(i), [inputs(i)]) for i in (1, 2)]
    expected = merge(build(0).state_dict(), [build(i).state_dict() for i in (1, 2)], "bmm", statistics=seen, **options)  # type: ignore[arg-type]
    found = load_file(place / "out" / "model.safetensors")
    assert all(torch.allclose(found[n], v, rtol=1e-4, atol=1e-6) for n, v in expected.items())
    assert {p.name for p in (place / "out").iterdir()} == {"model.safetensors", "merge.json"}


def test_a_killed_fit_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: State = {}
    calls: list[str] = []
    fit = Posterior.mean
    monkeypatch.setattr(Posterior, "mean", lambda self, *a: (calls.append("fit"), fit(self, *a))[1])

    def load(name: str) -> tuple[Tensor, Tensor]:
        return BASE[name].clone(), torch.stack([s[name] for s in STATES])

    results = []
    for merger in (make("bmm"), make("bmm")):
        engine = Engine(lambda _, merger=merger: merger, (), GRAMIANS, kept=kept)  # type: ignore[misc]
        engine.survey(list(BASE), load)
        results.append({n: engine.merge(n, *load(n)) for n in BASE})
    assert len(calls) == 2, "one for each linear layer, the first time"
    assert all(torch.equal(v, results[1][n]) for n, v in results[0].items())


@pytest.mark.parametrize("gram", ["data", "trace", "hybrid"])
@pytest.mark.parametrize("jointly", [True, False])
def test_one_sum_for_all_strengths_is_the_merger(gram: str, jointly: bool) -> None:
    anchor = merge(BASE, STATES, "ties", density=0.6)
    sums = Posteriors.of(BASE, STATES, anchor, GRAMIANS, gram=gram, jointly=jointly, weights=[1.0, 2.0, 0.5])  # type: ignore[arg-type]
    for strength, scale in ((0.0, 1.0), (0.3, 0.7)):
        found = sums.merged(strength, scale)
        options = {"anchor": make("ties", density=0.6), "gram": gram, "bias": jointly, "weights": [1.0, 2.0, 0.5]}
        expected = merge(BASE, STATES, "bmm", statistics=GRAMIANS, strength=strength, scale=scale, **options)  # type: ignore[arg-type]
        fitted = [n for n in BASE if n[0] in "03" and (jointly or "weight" in n)]
        assert all(close(found[n], expected[n], 1e-7) for n in fitted)
        assert all(close(found[n], anchor[n]) for n in BASE if n not in fitted)
    mixed = sums.merged({"0.weight": 0.0, "3.weight": 5.0}, {"0.weight": 1.0, "3.weight": 0.5})
    assert close(mixed["0.weight"], sums.merged(0.0)["0.weight"])
    assert close(mixed["3.weight"], sums.merged(5.0, 0.5)["3.weight"])


def test_without_statistics_task_vectors_stand_in() -> None:
    anchor = merge(BASE, STATES, "task_arithmetic")
    found = Posteriors.of(BASE, STATES, anchor).merged(0.2)
    expected = merge(BASE, STATES, "bmm_data_free", strength=0.2)
    assert all(close(found[n], expected[n], 1e-7) for n in BASE)


def test_draws_have_the_posterior_s_covariance() -> None:
    D = W - W0
    p = Posterior.of(D, [X.T @ X / len(X) for X in INPUTS], [1.0] * T, D.mean(0))
    g = torch.Generator().manual_seed(0)
    draws = torch.cat([p.sample(0.3, 2.0, g) - p.mean(0.3) for _ in range(3000)])
    s = float(p.S.trace()) / N
    expected = 4 * torch.linalg.inv(p.S + 0.3 * s * torch.eye(N, dtype=torch.float64))
    found = draws.T @ draws / len(draws)
    assert close(found, expected, 0.03)
    residual = torch.cat([X @ (W[t] - W0 - p.mean(0.3)).T / math.sqrt(len(X)) for t, X in enumerate(INPUTS)])
    assert p.residual(p.mean(0.3)) == pytest.approx(float(residual.square().sum() / (T * M)) ** 0.5)


def test_sampled_models_scatter_around_the_merged_one() -> None:
    sums = Posteriors.of(BASE, STATES, merge(BASE, STATES, "average"), GRAMIANS)
    middle, one, two = sums.merged(0.1), sums.sampled(0.1, seed=1), sums.sampled(0.1, seed=2)
    assert all(torch.equal(v, sums.sampled(0.1, seed=1)[n]) for n, v in one.items())
    assert not close(one["0.weight"], two["0.weight"], 1e-3)
    assert close(sums.sampled(0.1, sigma=0.0)["0.bias"], middle["0.bias"])
    assert torch.equal(one["2.weight"], middle["2.weight"])


# --- searching


def bowl(z: np.ndarray) -> float:
    return -float(((z - np.array([0.3, -1.2, 0.7])) ** 2).sum())


BOUNDS = [(-2.0, 2.0)] * 3


def test_expected_improvement_finds_a_peak_that_chance_does_not() -> None:
    best = {
        how: [search(bowl, BOUNDS, budget=30, how=how, seed=s).best.value for s in range(3)] for how in ("gp", "random")
    }  # type: ignore[arg-type]
    assert max(-v for v in best["gp"]) < 0.01
    assert np.mean(best["random"]) < 5 * np.mean(best["gp"])


@given(st.sampled_from(["gp", "random", "grid"]), st.integers(1, 9), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_every_way_keeps_to_budget_and_bounds(how: str, budget: int, seed: int) -> None:
    bounds = [(-4.0, 2.0), (0.5, 1.5)]
    found = search(lambda z: float(np.sin(5 * z).sum()), bounds, budget=budget, how=how, seed=seed)  # type: ignore[arg-type]
    again = search(lambda z: float(np.sin(5 * z).sum()), bounds, budget=budget, how=how, seed=seed)  # type: ignore[arg-type]
    assert found == again
    assert len(found.trials) == budget
    assert all(low <= v <= high for t in found.trials for v, (low, high) in zip(t.z, bounds, strict=True))
    assert found.best.value == max(t.value for t in found.trials)


def test_the_grid_goes_along_one_coordinate_after_another() -> None:
    found = search(bowl, BOUNDS, budget=15, how="grid")
    points = np.array([t.z for t in found.trials])
    assert points[:5, 0].tolist() == [-2, -1, 0, 1, 2]
    assert set(points[5:, 0]) == {0.0}
    assert found.best.z == (0.0, -1.0, 1.0)


def test_a_search_starts_where_it_is_told() -> None:
    found = search(bowl, BOUNDS, budget=8, start=[[0.3, -1.2, 0.7]], seed=1)
    assert found.trials[0].value == 0
    assert found.best == found.trials[0]
    for start in ([[0.0, 0.0, 3.0]], [[0.0]]):
        with pytest.raises(InputError, match="starts within its bounds"):
            search(bowl, BOUNDS, start=start)
    for bounds, budget in (([(1.0, 1.0)], 5), ([], 5), ([(0.0, 1.0)], 0)):
        with pytest.raises(InputError, match="a search needs a budget, and in each dimension"):
            search(bowl, bounds, budget=budget)
    with pytest.raises(TrainingError, match="the objective of the search is nan at"):
        search(lambda z: float("nan"), BOUNDS)


def test_strengths_are_tuned_by_group() -> None:
    sums = Posteriors.of(BASE, STATES, merge(BASE, STATES, "task_arithmetic"), GRAMIANS)
    target = sums.merged({"0.weight": 1e-3, "3.weight": 10.0})

    def nearness(state: State) -> float:
        return -max(float((state[n] - target[n]).norm() / target[n].norm()) for n in ("0.weight", "3.weight"))

    tuned = sums.search(nearness, group=lambda n: n[0], scales=None, budget=25, start=[0.1])
    assert tuned.strengths["0"] < 0.1 < tuned.strengths["3"]
    assert tuned.scales == {"0": 1.0, "3": 1.0}
    assert nearness(tuned.state) == pytest.approx(tuned.found.best.value)
    assert tuned.found.trials[0].z == pytest.approx((-1.0, -1.0))
    shared = sums.search(nearness, budget=10)
    assert set(shared.strengths) == set(shared.scales) == {"all"}
    assert len(shared.found.trials[0].z) == 2


def test_what_cannot_be_fitted_is_said() -> None:
    with pytest.raises(InputError, match="cannot be the anchor: its statistics are not gathered here"):
        make("bmm_data_free", anchor="fisher")
    with pytest.raises(InputError, match="the strength of the anchor lies between 0 and inf"):
        make("bmm", strength=-1.0)
    with pytest.raises(InputError, match="those of 'data', of 'trace' 1, or a 'hybrid', not 'full'"):
        make("bmm", gram="full")
    with pytest.raises(InputError, match="has its scale"):
        make("bmm", anchor=make("ties"), anchor_scale=0.4)
    with pytest.raises(InputError, match="2 statistics are given for 3 experts"):
        Posteriors.of(BASE, STATES, BASE, GRAMIANS[:2])
    with pytest.raises(InputError, match="no matrix to be fitted"):
        Posteriors.of(BASE, STATES, BASE, [{"x": torch.ones(2, 2)}] * 3)


def test_a_bias_of_a_transposed_weight_is_the_anchor_s() -> None:
    shapes = {"c_attn.weight": (4, 6), "c_attn.bias": (6,)}
    base, *experts = ({n: draw(*s, seed=10 * k + len(s)) for n, s in shapes.items()} for k in range(3))
    found = merge(base, experts, "bmm_data_free")
    assert close(found["c_attn.bias"], merge(base, experts, "task_arithmetic")["c_attn.bias"])
    assert close(found["c_attn.weight"], merge(base, experts, "bmm_data_free", bias=False)["c_attn.weight"])

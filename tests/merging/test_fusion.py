"""Low-rank experts on one base: mixed by outputs, by weights, by the input; chosen, grouped, counted."""

from __future__ import annotations

import copy
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging.arrow import arrow_prototypes
from polytask.merging.clustering import expert_cosines, mbc_clusters, medoids
from polytask.merging.coefficients import (
    expert_losses,
    expert_probabilities,
    fit_coefficients,
    fit_ensemble,
    search_coefficients,
    train_router,
)
from polytask.merging.fusion import ensemble, forward_multiplier, fusion_report, merge_experts, route_experts
from polytask.merging.greedy import greedy_coverage, greedy_ensemble
from polytask.merging.library import ExpertLibrary
from polytask.merging.routed import LowRank

WIDTH, HIDDEN, CLASSES, RANK = 6, 10, 4, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(seed: int) -> dict[str, Tensor]:
    """An expert of both layers, under peft's names."""
    shapes = {"0": (HIDDEN, WIDTH), "2": (CLASSES, HIDDEN)}
    found = {}
    for i, (layer, (out, width)) in enumerate(shapes.items()):
        found[f"{layer}.lora_A.weight"] = draw(RANK, width, seed=10 * seed + i)
        found[f"{layer}.lora_B.weight"] = draw(out, RANK, seed=10 * seed + i + 5)
    return found


def library(experts: int = 3, linear: bool = False, same: bool = False) -> ExpertLibrary:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Identity() if linear else nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    return ExpertLibrary.from_states(base.double(), {f"e{k}": state(0 if same else k) for k in range(experts)}, 0.5)


def one_linear(experts: int) -> ExpertLibrary:
    states = {f"e{k}": {n: v for n, v in state(k).items() if n[0] == "0"} for k in range(experts)}
    torch.manual_seed(0)
    return ExpertLibrary.from_states(nn.Sequential(nn.Linear(WIDTH, HIDDEN)).double(), states)


def alone(lib: ExpertLibrary, k: int) -> nn.Module:
    return merge_experts(lib, F.one_hot(torch.tensor(k), len(lib.names)).double())


x = draw(20, WIDTH, seed=7)
labels = torch.randint(CLASSES, (20,), generator=torch.Generator().manual_seed(1))


def test_an_expert_alone_is_base_plus_its_scaled_product() -> None:
    lib = library()
    model = alone(lib, 1)
    expected = lib.base[0].weight + 0.5 * state(1)["0.lora_B.weight"] @ state(1)["0.lora_A.weight"]
    assert torch.allclose(model[0].weight, expected)
    assert torch.equal(model[0].bias, lib.base[0].bias)
    assert not torch.allclose(lib.base[0].weight, expected), "the base is left alone"


def test_names_turned_around_mean_the_same() -> None:
    turned = {
        f"e{k}": {
            n.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): v.T for n, v in state(k).items()
        }
        for k in range(3)
    }
    wrapped = {f"e{k}": {f"base_model.model.{n}": v for n, v in state(k).items()} for k in range(3)}
    lib = library()
    for states in (turned, wrapped):
        again = ExpertLibrary.from_states(lib.base, states, 0.5)
        for weight, low in lib.layers.items():
            assert torch.equal(again.layers[weight].A, low.A)
            assert torch.equal(again.layers[weight].B, low.B)


@pytest.mark.parametrize("family", ["ensemble", "logits", "merge", "factors", "route arrow", "route linear"])
def test_one_expert_is_what_all_families_make_of_it(family: str) -> None:
    lib = library(1)
    expected = alone(lib, 0)(x).log_softmax(-1)
    made = {
        "ensemble": lambda: ensemble(lib),
        "logits": lambda: ensemble(lib, space="logits"),
        "merge": lambda: merge_experts(lib),
        "factors": lambda: merge_experts(lib, space="factors"),
        "route arrow": lambda: route_experts(lib, "arrow"),
        "route linear": lambda: route_experts(lib, "linear"),
    }[family]()
    assert torch.allclose(made(x).log_softmax(-1), expected)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_copies_of_one_expert_are_it_under_any_weights(raw: list[float]) -> None:
    lib = library(same=True)
    w = torch.tensor(raw, dtype=torch.float64)
    w = w / w.sum()
    expected = alone(lib, 0)(x).log_softmax(-1)
    for made in (
        ensemble(lib, w),
        ensemble(lib, w, "logits"),
        merge_experts(lib, w),
        merge_experts(lib, w, "factors"),
        route_experts(lib, "arrow"),
    ):
        assert torch.allclose(made(x).log_softmax(-1), expected)


@pytest.mark.parametrize("k", range(3))
def test_all_weight_on_one_expert_selects_it(k: int) -> None:
    lib, w = library(), F.one_hot(torch.tensor(k), 3).double()
    expected = alone(lib, k)(x).log_softmax(-1)
    for made in (ensemble(lib, w), ensemble(lib, w, "logits"), merge_experts(lib, w, "factors")):
        assert torch.allclose(made(x).log_softmax(-1), expected)
    routed = route_experts(lib, "linear")
    for layer in (routed[0], routed[2]):
        layer.router.b.data = 1e3 * w
    assert torch.allclose(routed(x).log_softmax(-1), expected)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_outputs_and_weights_mix_alike_where_all_is_linear(raw: list[float]) -> None:
    # one layer, so that logits are affine in each expert's weights; weights sum to 1, as the base's share must
    lib, w = one_linear(3), torch.tensor(raw, dtype=torch.float64)
    w = w + (1 - w.sum()) / 3
    assert torch.allclose(ensemble(lib, w, "logits")(x), merge_experts(lib, w)(x))


def test_logits_and_weights_mix_differently_where_it_is_not() -> None:
    lib = library()
    assert not torch.allclose(ensemble(lib, space="logits")(x), merge_experts(lib)(x), rtol=1e-2)


def test_an_untrained_router_is_the_uniform_merge_and_a_constant_one_any_merge() -> None:
    lib = library()
    routed = route_experts(lib, "linear")
    assert torch.allclose(routed(x), merge_experts(lib)(x))
    q = draw(3, seed=3)
    for layer in (routed[0], routed[2]):
        layer.router.b.data = q
    assert torch.allclose(routed(x), merge_experts(lib, q.softmax(0))(x))


def test_factors_have_cross_terms_unless_one_side_is_shared() -> None:
    lib = library()
    for weight, low in lib.layers.items():
        assert not torch.allclose(
            merge_experts(lib).state_dict()[weight], merge_experts(lib, space="factors").state_dict()[weight], rtol=1e-2
        )
        for A, B in ((low.A[:1].expand_as(low.A), low.B), (low.A, low.B[:1].expand_as(low.B))):
            tied = ExpertLibrary(lib.base, lib.names, {**lib.layers, weight: LowRank(A, B)})
            assert torch.allclose(
                merge_experts(tied).state_dict()[weight], merge_experts(tied, space="factors").state_dict()[weight]
            )


def test_weights_by_layer() -> None:
    lib = library()
    w = {"0.weight": draw(3, seed=1), "2.weight": draw(3, seed=2)}
    model = merge_experts(lib, w)
    for layer, weight in ((model[0], "0.weight"), (model[2], "2.weight")):
        low = lib.layers[weight]
        assert torch.allclose(
            layer.weight, lib.base.state_dict()[weight] + torch.einsum("k,kor,kri->oi", w[weight], low.B, low.A)
        )


# --- fitting


def test_the_ensemble_s_weights_are_the_best_there_are() -> None:
    p = draw(4, 60, CLASSES, seed=4).mul(2).softmax(-1)
    y = torch.randint(CLASSES, (60,), generator=torch.Generator().manual_seed(2))
    own = p[:, torch.arange(60), y]

    def nll(w: Tensor) -> float:
        return -float((w @ own).log().mean())

    w = fit_ensemble(p, y, steps=2000)
    assert float(w.sum()) == pytest.approx(1)
    assert nll(w) <= nll(torch.full((4,), 0.25, dtype=torch.float64))
    assert nll(w) <= min(nll(e) for e in torch.eye(4, dtype=torch.float64)) + 1e-6
    # optimality on the simplex: no expert has a mean likelihood ratio above 1, and those in use have 1
    ratio = (own / (w @ own)).mean(1)
    assert float(ratio.max()) <= 1 + 1e-3
    assert float((w * (ratio - 1)).abs().max()) < 1e-3


@pytest.mark.parametrize("per", ["model", "layer"])
@pytest.mark.parametrize("simplex", [False, True])
def test_coefficients_find_the_expert_that_made_the_labels(per: str, simplex: bool) -> None:
    lib = library()
    inputs = draw(200, WIDTH, seed=11)
    truth = alone(lib, 2)(inputs).argmax(-1)
    before = F.cross_entropy(merge_experts(lib)(inputs), truth)
    w = fit_coefficients(lib, [(inputs, truth)], per=per, simplex=simplex, steps=150)  # type: ignore[arg-type]
    for each in w.values() if isinstance(w, dict) else [w]:
        assert int(each.argmax()) == 2
        assert not simplex or float(each.sum()) == pytest.approx(1, rel=1e-5)
    assert F.cross_entropy(merge_experts(lib, w)(inputs), truth) < 0.5 * before


def test_coefficients_are_found_without_gradients() -> None:
    lib = library()
    inputs = draw(200, WIDTH, seed=11)
    truth = alone(lib, 2)(inputs).argmax(-1)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(F.cross_entropy(model(inputs), truth))

    w = search_coefficients(lib, loss, budget=20)
    assert int(w.argmax()) == 2
    assert float(w.abs().max()) <= 1.5
    assert loss(merge_experts(lib, w)) < 0.6 * loss(merge_experts(lib))
    # the penalty alone is least at the base, which is tried first
    assert search_coefficients(lib, loss, penalty=1e6, budget=5).tolist() == [0.0, 0.0, 0.0]


def test_a_start_at_one_expert_stays_there_without_steps() -> None:
    lib = library()
    w = fit_coefficients(lib, [(x, labels)], per="model", start=torch.tensor([0.0, 1.0, 0.0]), steps=0, noise=1e-3)
    assert isinstance(w, Tensor)
    assert float((w - torch.tensor([0.0, 1.0, 0.0])).abs().max()) <= 1e-3


def test_training_a_router_changes_nothing_else() -> None:
    lib = library()
    inputs = draw(200, WIDTH, seed=11)
    inputs[:100] += 3
    truth = torch.cat([alone(lib, k)(part).argmax(-1) for k, part in enumerate(inputs.split(100))])
    routed = route_experts(lib, "linear")
    before = copy.deepcopy(routed.state_dict())
    loss = F.cross_entropy(routed(inputs), truth)
    train_router(routed, [(inputs, truth)], steps=150, learning_rate=0.05)
    assert F.cross_entropy(routed(inputs), truth) < 0.6 * loss
    changed = {n for n, v in routed.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {f"{layer}.router.{n}" for layer in "02" for n in "Rb"}
    assert all(p.grad is None for n, p in routed.named_parameters() if "router" not in n)
    with pytest.raises(InputError, match="nothing to train"):
        train_router(route_experts(lib, "arrow"), [(inputs, truth)])


# --- Arrow


def test_arrow_is_the_first_right_singular_vector() -> None:
    for low in library(4).layers.values():
        for v, A, B in zip(arrow_prototypes(low), low.A, low.B, strict=True):
            expected = torch.linalg.svd(B @ A).Vh[0]
            assert float((v @ expected).abs()) == pytest.approx(1, rel=1e-9)


def test_arrow_sees_the_update_and_not_its_factors() -> None:
    low = library().layers["0.weight"]
    G = draw(3, RANK, RANK, seed=8)
    for other in (LowRank(G @ low.A, low.B @ torch.linalg.inv(G)), LowRank(low.A, -7 * low.B)):
        cosine = (arrow_prototypes(other) * arrow_prototypes(low)).sum(-1).abs()
        assert torch.allclose(cosine, torch.ones(3, dtype=torch.float64))
    lib = library()
    scaled = ExpertLibrary(lib.base, lib.names, {w: LowRank(3 * e.A, -e.B) for w, e in lib.layers.items()})
    for layer in (0, 2):
        inputs = draw(5, WIDTH if layer == 0 else HIDDEN)
        assert torch.allclose(
            route_experts(lib, "arrow", top_k=2)[layer].weights(inputs),
            route_experts(scaled, "arrow", top_k=2)[layer].weights(inputs),
        )


def test_padded_ranks_leave_arrow_alone() -> None:
    low = library().layers["0.weight"]
    padded = LowRank(F.pad(low.A, (0, 0, 0, 2)), F.pad(low.B, (0, 2)))
    cosine = (arrow_prototypes(padded) * arrow_prototypes(low)).sum(-1).abs()
    assert torch.allclose(cosine, torch.ones(3, dtype=torch.float64))


# --- choosing and grouping


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_greedy_coverage_is_near_the_best_choice(seed: int, m: int) -> None:
    losses = draw(6, 5, seed=seed).exp()
    chosen = greedy_coverage(losses, m)
    assert len(set(chosen)) == m

    def value(S: tuple[int, ...]) -> float:
        return float(losses[list(S)].min(0).values.mean())

    assert value(tuple(chosen)) <= value(tuple(chosen[:-1] or chosen))
    best = min(value(S) for S in combinations(range(6), m))
    # the gain over the worst loss is what is submodular
    worst = float(losses.max(0).values.mean())
    assert worst - value(tuple(chosen)) >= (1 - 1 / 2.718281828) * (worst - best) - 1e-9
    assert chosen[0] == int(losses.mean(1).argmin())


def test_greedy_ties_go_to_the_first_and_all_is_all() -> None:
    losses = torch.ones(4, 3)
    assert greedy_coverage(losses, 4) == [0, 1, 2, 3]
    p = torch.full((4, 5, 2), 0.5)
    y = torch.zeros(5, dtype=torch.long)
    assert greedy_ensemble(p, y, 4) == [0, 1, 2, 3]
    assert greedy_ensemble(p, y, 3, replacement=True) == [0, 0, 0]
    for wrong in (0, 5):
        with pytest.raises(InputError, match="of 4 experts 1 to 4 can be chosen"):
            greedy_coverage(losses, wrong)


def test_greedy_ensembles_take_what_lowers_the_loss_most() -> None:
    p = draw(5, 40, CLASSES, seed=4).mul(2).softmax(-1)
    y = torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(2))
    own = p[:, torch.arange(40), y]
    chosen: list[int] = []
    for _ in range(3):
        left = [k for k in range(5) if k not in chosen]
        chosen.append(min(left, key=lambda k: -float(own[[*chosen, k]].mean(0).log().mean())))
    assert greedy_ensemble(p, y, 3) == chosen
    assert len(greedy_ensemble(p, y, 9, replacement=True)) == 9


def near_pairs() -> ExpertLibrary:
    """Six experts in three pairs that differ little."""
    states = {f"e{k}": {n: v + 0.05 * draw(*v.shape, seed=99 + k) for n, v in state(k % 3).items()} for k in range(6)}
    return ExpertLibrary.from_states(library().base, states)


def test_clusters_hold_what_is_alike_in_any_order() -> None:
    lib = near_pairs()
    expected = {frozenset(p) for p in (("e0", "e3"), ("e1", "e4"), ("e2", "e5"))}
    orders = [p for i, p in enumerate(permutations(lib.names)) if i % 97 == 0]
    for order in orders:
        assert {frozenset(g) for g in mbc_clusters(lib.subset(order), 3).values()} == expected
    assert {len(g) for g in mbc_clusters(lib, 6).values()} == {1}
    assert list(mbc_clusters(lib, 1)) == ["e0"]
    with pytest.raises(InputError, match="6 experts make 1 to 6 groups, not 7"):
        mbc_clusters(lib, 7)


def test_cosines_are_those_of_the_entries_that_are_kept() -> None:
    lib = near_pairs()
    rows = torch.stack([torch.cat([t[k].flatten() for e in lib.layers.values() for t in (e.A, e.B)]) for k in range(6)])
    kept = rows * (rows.abs() > rows.abs().quantile(0.5, dim=1, keepdim=True))
    expected = F.cosine_similarity(kept[:, None], kept[None], dim=-1)
    assert torch.allclose(expert_cosines(lib), expected, atol=1e-9)
    copies = lib.subset(["e0", "e1", "e0"])
    assert float(expert_cosines(copies)[0, 2]) == pytest.approx(1)


def test_a_group_s_expert_is_the_mean_of_its_members() -> None:
    lib = near_pairs()
    groups = {"a": ["e0", "e3"], "b": ["e1", "e2", "e5"], "c": ["e4"]}
    small = lib.grouped(groups)
    assert small.names == ("a", "b", "c")
    for k, members in enumerate(groups.values()):
        expected = merge_experts(lib.subset(members))
        found = alone(small, k)
        assert torch.allclose(found(x), expected(x))
    assert medoids(lib, {"a": ["e0"], "b": ["e1", "e4"]}) == ["e0", "e1"]


# --- what is told


def test_predictions_are_computed_once_for_all_choices() -> None:
    lib = library()
    p, y = expert_probabilities(lib, [(x[:8], labels[:8]), (x[8:], labels[8:])])
    assert torch.equal(y, labels)
    for k in range(3):
        assert torch.allclose(p[k], alone(lib, k)(x).softmax(-1))
    tasks = {"a": [(x[:8], labels[:8])], "b": [(x[8:], labels[8:])]}
    losses = expert_losses(lib, tasks)
    assert float(losses[2, 1]) == pytest.approx(float(F.cross_entropy(alone(lib, 2)(x[8:]), labels[8:])))


def test_the_report_counts_what_a_system_costs() -> None:
    lib = library()
    systems = {"ensemble": ensemble(lib), "merge": merge_experts(lib), "router": route_experts(lib, "linear", top_k=2)}
    rows = {r.name: r for r in fusion_report(lib, systems, lambda m: float(m(x).argmax(-1).eq(labels).float().mean()))}
    assert (rows["ensemble"].forward, rows["merge"].forward, rows["merge"].parameters) == (3, 1, 0)
    own = WIDTH * HIDDEN + HIDDEN * CLASSES
    used = 2 * RANK * (WIDTH + HIDDEN + HIDDEN + CLASSES) + 3 * (WIDTH + HIDDEN)
    assert rows["router"].forward == pytest.approx(1 + used / own)
    assert rows["router"].parameters == lib.parameters + 3 * (WIDTH + 1) + 3 * (HIDDEN + 1)
    assert forward_multiplier(ensemble(lib, torch.tensor([0.5, 0.5, 0.0]))) == 2
    assert rows["merge"].metric == pytest.approx(float(merge_experts(lib)(x).argmax(-1).eq(labels).float().mean()))


def test_what_cannot_be_fused_is_said() -> None:
    lib = library()
    base = lib.base
    half = {n: v for n, v in state(0).items() if "lora_A" in n}
    for states, message in (
        ({}, "at least one expert"),
        ({"e": {"0.weight": x}}, "0.weight of the expert e is no part of a low-rank update"),
        ({"e": half}, "the expert e has only one half of the update of 0"),
        ({"e": {n.replace("0.", "7."): v for n, v in state(0).items()}}, "the base has no tensor 7.weight"),
        ({"e": {n: v.T for n, v in state(0).items()}}, "the update of 0.weight by e is"),
    ):
        with pytest.raises(InputError, match=message):
            ExpertLibrary.from_states(base, states)
    with pytest.raises(InputError, match="there is no expert 'e9'; there are e0, e1, e2"):
        lib.subset(["e9"])
    with pytest.raises(InputError, match=r"\[2\] weights of 0.weight are given for 3 experts"):
        merge_experts(lib, torch.ones(2))
    with pytest.raises(InputError, match=r"weights are given for 0\.weight, and the layers are"):
        merge_experts(lib, {"0.weight": torch.ones(3)})
    with pytest.raises(InputError, match="not negative and sum to 1"):
        ensemble(lib, torch.tensor([0.5, 0.9, -0.4]))
    with pytest.raises(InputError, match="there is no router 'random'"):
        route_experts(lib, "random")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no batch"):
        fit_coefficients(lib, [])
    with pytest.raises(InputError, match="start from uniform"):
        fit_coefficients(lib, [(x, labels)], simplex=True, start=torch.ones(3))

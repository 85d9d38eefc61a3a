"""Merging that runs the model: what is exact about each method, and that it helps where it must."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging import adapt, gather_fisher, gather_gramians, merge
from polytask.merging.adaptive import Adaptive, entropy
from polytask.registry import Method, methods

from .conftest import distance

State = dict[str, Tensor]
ADAPTIVE = {m.name: m for m in methods("merging") if issubclass(m.factory, Adaptive)}
QUICK: dict[str, dict[str, object]] = {
    "adamerging": {"steps": 60, "learning_rate": 0.02},
    "adarank": {"steps": 30},
    "concrete": {"steps": 20},
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def task(t: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * t + seed)
    centres = 2.0 * torch.randn(4, 12, generator=torch.Generator().manual_seed(77 + t))
    y = torch.randint(0, 4, (n,), generator=g)
    return centres[y] + 0.8 * torch.randn(n, 12, generator=g), y


@pytest.fixture(scope="module")
def world() -> tuple[nn.Sequential, State, dict[str, State]]:
    model = net()

    def train(pairs: list[tuple[Tensor, Tensor]], steps: int) -> State:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            loss = torch.stack([F.cross_entropy(model(x), y) for x, y in pairs]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {n: v.detach().clone() for n, v in model.state_dict().items()}

    base = train([task(t, 60, 0) for t in range(3)], 8)
    experts = {}
    for t in range(3):
        model.load_state_dict(base)
        experts[f"task {t}"] = train([task(t, 200, 1)], 80)
    return model, base, experts


def accuracy(model: nn.Module, state: State) -> float:
    model.load_state_dict(state)
    with torch.no_grad():
        return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in (task(t, 400, 2) for t in range(3))) / 3


def inputs(labels: bool = False) -> dict[str, list[object]]:
    pairs = {f"task {t}": [task(t, 64, 3 + i) for i in range(2)] for t in range(3)}
    return {e: list(p) if labels else [x for x, _ in p] for e, p in pairs.items()}


@pytest.fixture(params=ADAPTIVE.values(), ids=ADAPTIVE)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


def test_registration(method: Method) -> None:
    assert method.needs == "inputs"
    assert method.summary.endswith(".")


def test_the_model_is_left_alone_and_nothing_is_left_to_chance(
    method: Method, world: tuple[nn.Sequential, State, dict[str, State]]
) -> None:
    model, base, experts = world
    before = {n: v.clone() for n, v in model.state_dict().items()}
    first, second = (
        adapt(model, base, experts, inputs(), method.name, check=False, **QUICK.get(method.name, {})) for _ in range(2)
    )
    assert all(torch.equal(first[n], second[n]) for n in base)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


WALK = {"labels": True, "start": 0.0, "stride": 1.0}
"""Frank and Wolfe's own step from the base on, as far as labels lead."""


KNOWING: list[tuple[str, dict[str, object]]] = [
    ("regmean_pp", {}),
    ("frank_wolfe", {**WALK, "wise": "layer", "steps": 100}),
]


@pytest.mark.parametrize(("name", "options"), KNOWING)
def test_what_knows_layers_or_labels_does_better_than_the_mean(
    name: str, options: dict[str, object], world: tuple[nn.Sequential, State, dict[str, State]]
) -> None:
    model, base, experts = world
    found = adapt(model, base, experts, inputs("labels" in options), name, **options)
    assert accuracy(model, found) > max(accuracy(model, base), accuracy(model, merge(base, experts, "average")))


@pytest.mark.parametrize("name", ["adamerging", "adarank"])
def test_labels_lead_to_lower_loss_and_entropy_to_lower_entropy(
    name: str, world: tuple[nn.Sequential, State, dict[str, State]]
) -> None:
    model, base, experts = world
    quick = {"steps": 60, "learning_rate": 0.02, "check": False}
    right = adapt(model, base, experts, inputs(labels=True), name, labels=True, **quick)
    sure = adapt(model, base, experts, inputs(), name, **quick)
    start = adapt(model, base, experts, inputs(), name, **quick | {"steps": 0})

    def loss(state: State) -> float:
        model.load_state_dict(state)
        with torch.no_grad():
            return float(sum(F.cross_entropy(model(x), y) for pairs in inputs(labels=True).values() for x, y in pairs))

    assert loss(right) < min(loss(start), loss(sure))
    assert uncertainty(model, sure) < min(uncertainty(model, start), uncertainty(model, right))


def uncertainty(model: nn.Module, state: State) -> float:
    model.load_state_dict(state)
    with torch.no_grad():
        return float(sum(entropy(model(x)) for found in inputs().values() for x in found))


def test_no_change_stays_none(method: Method, world: tuple[nn.Sequential, State, dict[str, State]]) -> None:
    model, base, _ = world
    found = adapt(
        model, base, {"task 0": base}, {"task 0": inputs()["task 0"]}, method.name, **QUICK.get(method.name, {})
    )
    assert distance(found, base) < 1e-5


# --- AdaMerging


@pytest.mark.parametrize("wise", ["task", "layer"])
def test_adamerging_lowers_the_entropy_within_its_span(
    wise: str, world: tuple[nn.Sequential, State, dict[str, State]]
) -> None:
    model, base, experts = world

    start = adapt(model, base, experts, inputs(), wise=wise, steps=0)
    assert distance(start, merge(base, experts, "task_arithmetic", scale=0.3)) < 1e-6
    found = adapt(model, base, experts, inputs(), wise=wise, steps=60, learning_rate=0.02, check=False)
    assert uncertainty(model, found) < uncertainty(model, start)
    learned = []
    for n in base:
        D = torch.stack([e[n] - base[n] for e in experts.values()]).flatten(1).double()
        lam = torch.linalg.lstsq(D.T, (found[n] - base[n]).flatten().double()).solution
        assert torch.allclose(lam @ D, (found[n] - base[n]).flatten().double(), atol=1e-5)
        learned.append(lam)
    spread = torch.stack(learned).std(0).max()
    assert (spread < 1e-3) == (wise == "task")


# --- AdaRank


def test_adarank_with_every_direction_on_is_a_sum(world: tuple[nn.Sequential, State, dict[str, State]]) -> None:
    model, base, experts = world
    full = adapt(model, base, experts, inputs(), "adarank", rank=1.0, centred=False, scale=0.4, steps=0)
    assert distance(full, merge(base, experts, "task_arithmetic", scale=0.4)) < 1e-5
    start, found = (adapt(model, base, experts, inputs(), "adarank", steps=k, check=False) for k in (0, 30))
    assert uncertainty(model, found) < uncertainty(model, start)
    # departures from the mean sum to nothing
    centred = adapt(model, base, experts, inputs(), "adarank", rank=1.0, steps=0)
    assert distance(centred, merge(base, experts, "average")) < 1e-5


def test_adarank_starts_as_cart_and_learns_what_is_kept_and_how_much(
    world: tuple[nn.Sequential, State, dict[str, State]],
) -> None:
    model, base, experts = world
    start = adapt(model, base, experts, inputs(), "adarank", rank=0.25, scale=0.7, steps=0, check=False)
    assert distance(start, merge(base, experts, "cart", rank=0.25, departure=0.7)) < 1e-5
    # before any direction's entry can cross zero, coefficients move: by at most the rate a step
    few = adapt(
        model, base, experts, inputs(), "adarank", rank=0.25, scale=0.7, steps=5, learning_rate=1e-2, check=False
    )
    for n in base:
        departures = torch.stack([e[n] - base[n] for e in experts.values()])
        departures = (departures - departures.mean(0)).flatten(1)
        moved = float((few[n] - start[n]).norm())
        assert 0 < moved <= 0.051 * float(departures.norm(dim=1).sum())
    # at a rate that carries them across within a step, directions go on and off
    far = adapt(model, base, experts, inputs(), "adarank", rank=0.25, steps=1, learning_rate=0.5, check=False)
    assert distance(far, start) > distance(few, start)


# --- Frank-Wolfe


def coefficients(found: State, base: State, experts: dict[str, State]) -> Tensor:
    """How much of each task vector a merged model holds; it must hold nothing else."""
    D = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in base]) for e in experts.values()]).double()
    moved = torch.cat([(found[n] - base[n]).flatten() for n in base]).double()
    lam = torch.linalg.lstsq(D.T, moved).solution
    assert torch.allclose(lam @ D, moved, atol=1e-4)
    return lam


def test_frank_wolfe_stays_between_the_models_and_passes_a_bad_one_by(
    world: tuple[nn.Sequential, State, dict[str, State]],
) -> None:
    model, base, experts = world
    everyone = {**experts, "bad": {n: v + 3 * torch.randn_like(v) for n, v in base.items()}}
    batches = {**inputs(labels=True), "bad": inputs(labels=True)["task 0"]}
    found = adapt(model, base, everyone, batches, "frank_wolfe", check=False, **WALK, steps=20)
    lam = coefficients(found, base, everyone)
    assert bool((lam > -1e-6).all())
    assert float(lam.sum()) < 1 + 1e-6
    assert abs(float(lam[-1])) < 1e-6
    assert float(lam[:-1].sum()) > 0.5


def test_frank_wolfe_walks_from_task_arithmetic_as_far_as_its_strides_reach(
    world: tuple[nn.Sequential, State, dict[str, State]],
) -> None:
    model, base, experts = world
    start = adapt(model, base, experts, inputs(), "frank_wolfe", steps=0, start=0.2)
    assert distance(start, merge(base, experts, "task_arithmetic", scale=0.2)) < 1e-6
    # one step of the walk: one expert more than the others by the whole stride, all others less by its share
    lam = coefficients(adapt(model, base, experts, inputs(), "frank_wolfe", steps=1, start=0.2), base, experts)
    gamma = 0.03 * 2 / 3
    chosen = int(lam.argmax())
    expected = torch.full((3,), 0.2 * (1 - gamma), dtype=torch.float64)
    expected[chosen] += gamma
    assert torch.allclose(lam, expected, atol=1e-5)


# --- RegMean++


def test_regmean_pp_is_regmean_where_there_is_one_layer() -> None:
    torch.manual_seed(0)
    base = {"weight": torch.randn(5, 8), "bias": torch.randn(5)}
    experts = {e: {n: v + 0.3 * torch.randn_like(v) for n, v in base.items()} for e in "ab"}
    batches = {e: [torch.randn(40, 8)] for e in "ab"}
    model = nn.Linear(8, 5)
    given = []
    for e, state in experts.items():
        model.load_state_dict(state)
        given.append(gather_gramians(model, batches[e]))
    expected = merge(base, experts, "regmean", statistics=given)
    expected["bias"] = sum(e["bias"] for e in experts.values()) / 2  # type: ignore[assignment]
    assert distance(adapt(model, base, experts, batches, "regmean_pp"), expected) < 1e-6


def test_regmean_pp_gives_one_expert_back(world: tuple[nn.Sequential, State, dict[str, State]]) -> None:
    model, base, experts = world
    only = {"task 1": experts["task 1"]}
    found = adapt(model, base, only, {"task 1": inputs()["task 1"]}, "regmean_pp", alpha=1.0)
    assert distance(found, only["task 1"]) < 1e-4


# --- what leads away is said


def test_a_result_further_from_the_experts_than_the_mean_is_warned_of(
    world: tuple[nn.Sequential, State, dict[str, State]],
) -> None:
    model, base, experts = world
    with pytest.warns(UserWarning, match=r"adarank led away from the experts: .* answers \d+% .*; keep that"):
        spoilt = adapt(model, base, experts, inputs(), "adarank", scale=-3.0, rank=1.0, centred=False, steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = adapt(
            model, base, experts, inputs(), "adarank", scale=-3.0, rank=1.0, centred=False, steps=0, check=False
        )
        adapt(model, base, experts, inputs(), "regmean_pp")
    assert all(torch.equal(kept[n], spoilt[n]) for n in base)


# --- heads, bad input


def test_heads_of_different_shapes_stay_apart(method: Method) -> None:
    torch.manual_seed(0)

    def two_layers(classes: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))

    model = two_layers(3)
    base = {n: v.detach().clone() for n, v in model.state_dict().items()}
    experts = {}
    for classes, e in ((3, "a"), (5, "b")):
        own = two_layers(classes).state_dict()
        trunk = {n: v + 0.2 * torch.randn_like(v) for n, v in base.items() if n.startswith("0.")}
        experts[e] = {**{n: v.detach() for n, v in own.items()}, **trunk}
    batches = {e: [torch.randn(20, 6)] for e in experts}
    found = adapt(model, base, experts, batches, method.name, skip=["2.*"], **QUICK.get(method.name, {}))
    assert all(torch.equal(found[n], base[n]) for n in base if n.startswith("2."))
    assert any(not torch.equal(found[n], base[n]) for n in base if n.startswith("0."))


def test_bad_input(world: tuple[nn.Sequential, State, dict[str, State]]) -> None:
    model, base, experts = world
    with pytest.raises(InputError, match="no expert was given"):
        adapt(model, base, {}, {})
    with pytest.raises(InputError, match="inputs are of task 0; the experts are task 0, task 1, task 2"):
        adapt(model, base, experts, {"task 0": inputs()["task 0"]})
    with pytest.raises(InputError, match="there is no batch of inputs for task 2"):
        adapt(model, base, experts, {**inputs(), "task 2": []})
    with pytest.raises(InputError, match=r"frank_wolfe was told labels: .* those of task 0 are not"):
        adapt(model, base, experts, inputs(), "frank_wolfe", labels=True)
    with pytest.raises(InputError, match="adamerging has no option 'rank'"):
        adapt(model, base, experts, inputs(), rank=2)
    with pytest.raises(InputError, match=r"the model has a tensor 6\.weight, which the base has not"):
        adapt(nn.Sequential(*net(), nn.ReLU(), nn.Linear(4, 4)), base, experts, inputs())


def test_merge_runs_the_model_where_a_method_asks_for_it(
    method: Method, world: tuple[nn.Sequential, State, dict[str, State]]
) -> None:
    model, base, experts = world
    options = QUICK.get(method.name, {})
    expected = adapt(model, base, experts, inputs(), method.name, check=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_name = merge(base, experts, method.name, model=model, inputs=inputs(), **options)
        in_order = merge(
            base,
            list(experts.values()),
            method.name,
            model=model,
            inputs=list(inputs().values()),
            dtype="float16",
            **options,
        )
    assert all(torch.equal(by_name[n], v) for n, v in expected.items())
    assert all(torch.equal(in_order[n], v.half()) for n, v in expected.items())


@pytest.mark.parametrize("name", ["regmean", "esm", "bmm", "fisher"])
def test_merge_gathers_what_it_needs_where_the_model_is_given(
    name: str, world: tuple[nn.Sequential, State, dict[str, State]]
) -> None:
    model, base, experts = world
    seen = []
    for expert, state in experts.items():
        own = net()
        own.load_state_dict(state)
        seen.append((gather_fisher if name == "fisher" else gather_gramians)(own, inputs()[expert]))
    expected = merge(base, experts, name, statistics=seen)
    found = merge(base, experts, name, model=model, inputs=inputs())
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    with pytest.raises(InputError, match=f"{name} takes statistics, or a model and inputs to gather them"):
        merge(base, experts, name, statistics=seen, model=model, inputs=inputs())


def test_inputs_that_do_not_fit(world: tuple[nn.Sequential, State, dict[str, State]]) -> None:
    model, base, experts = world
    with pytest.raises(InputError, match="ties uses no inputs"):
        merge(base, experts, "ties", model=model, inputs=inputs())
    with pytest.raises(InputError, match="the experts are task 0, task 1, task 2"):
        merge(base, experts, "regmean", model=model, inputs=list(inputs().values())[:2])
    with pytest.raises(InputError, match="there is no batch of inputs for task 1"):
        merge(base, experts, "regmean", model=model, inputs={**inputs(), "task 1": []})
    with pytest.raises(InputError, match="adamerging merges task vectors: it needs the base"):
        merge(None, experts, "adamerging", model=model, inputs=inputs())
    with pytest.raises(InputError, match="ties does not run the model"):
        adapt(model, base, experts, inputs(), "ties")


class Tied(nn.Module):
    """A language model's two ends: one tensor, two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


@pytest.mark.filterwarnings("ignore:.*led away")
@pytest.mark.parametrize("stored", ["both", "embedding.weight", "head.weight"])
def test_tensors_that_a_model_ties_are_merged_once(stored: str) -> None:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append({n: v for n, v in Tied().state_dict().items() if stored in ("both", n)})
    ids = {e: [torch.randint(5, (8, 3))] for e in ("a", "b")}
    found = merge(
        states[0],
        dict(zip("ab", states[1:], strict=True)),
        "adamerging",
        model=Tied(),
        inputs=ids,
        steps=3,
        learning_rate=0.1,
        start=0.5,
    )
    assert set(found) == set(states[0])
    assert len({v.sum().item() for v in found.values()}) == 1
    base, *experts = (next(iter(state.values())).flatten() for state in states)
    D = torch.stack([e - base for e in experts], 1)
    moved = next(iter(found.values())).flatten() - base
    lam = torch.linalg.lstsq(D, moved[:, None]).solution
    assert torch.allclose(D @ lam, moved[:, None], atol=1e-6)
    assert 0.01 < float((lam - 0.5).abs().max()) <= 0.3 + 1e-6  # three steps of Adam away from where it starts


@pytest.mark.filterwarnings("ignore:.*led away")
@pytest.mark.parametrize("name", ["adamerging", "adarank", "frank_wolfe", "concrete"])
def test_running_means_are_merged_without_a_slope(name: str) -> None:
    def normed(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        model(torch.randn(32, 12) + seed)
        return model.eval()

    states = [normed(s).state_dict() for s in range(3)]
    named = dict(zip(("task 0", "task 1"), states[1:], strict=True))
    batches = {t: inputs()[t] for t in named}
    found = merge(states[0], named, name, model=normed(0), inputs=batches, steps=3)
    assert all(torch.isfinite(v).all() for v in found.values() if v.is_floating_point())
    assert not torch.equal(found["1.running_mean"], states[0]["1.running_mean"])


def test_a_dtype_for_the_result_lets_models_differ_in_theirs(
    world: tuple[nn.Sequential, State, dict[str, State]],
) -> None:
    model, base, experts = world
    half = {e: {n: v.bfloat16() for n, v in s.items()} for e, s in experts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = merge(base, half, "regmean_pp", model=model, inputs=inputs(), dtype="float32")
    assert {v.dtype for v in found.values()} == {torch.float32}

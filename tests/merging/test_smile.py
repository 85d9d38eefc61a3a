"""SMILE: a base with the leading directions of its experts, each token where its own lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from polytask.cli import app
from polytask.errors import InputError
from polytask.merging import forcing, load_routed, make, recording, route_by_subspaces, save_routed
from polytask.merging.fusion import forward_multiplier
from polytask.merging.routed import routed_layers

from .test_esm_pp import Block, block, tokens
from .test_oracles import rows

State = dict[str, Tensor]


def expert(seed: int, size: float = 1.0) -> State:
    """The base's state a little away, in every linear layer and bias."""
    away = block(seed).state_dict()
    return {n: v + size * (away[n] - v) for n, v in block(0).state_dict().items()}


def experts(size: float = 1.0) -> dict[str, State]:
    return {"cars": expert(1, size), "digits": expert(2, size)}


def plain(state: State) -> Block:
    model = block(0)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_a_layer_is_its_formula_token_by_token() -> None:
    base, W = nn.Linear(9, 7).double(), [nn.Linear(9, 7).double() for _ in range(3)]
    model = route_by_subspaces(
        nn.Sequential(nn.Linear(9, 7)).double().requires_grad_(False),
        {str(t): {f"0.{n}": v for n, v in w.state_dict().items()} for t, w in enumerate(W)},
        rank=3,
        gate=2,
        top_k=2,
    )
    base.load_state_dict({n: model.state_dict()[f"0.{n}"] for n in ("weight", "bias")})
    x = rows(4, 5, 9)
    found = model(x)
    for i in range(4):
        for j in range(5):
            token, held, parts = x[i, j], [], []
            for w in W:
                U, S, Vh = torch.linalg.svd(w.weight - base.weight, full_matrices=False)
                held.append(float((Vh[:2] @ token).norm()))
                parts.append(U[:, :3] @ torch.diag(S[:3]) @ Vh[:3] @ token + w.bias - base.bias)
            best = sorted(range(3), key=lambda t: -held[t])[:2]
            weights = torch.tensor([held[t] for t in best], dtype=torch.float64).softmax(0)
            expected = base(token) + sum(p * parts[t] for p, t in zip(weights, best, strict=True))
            assert torch.allclose(found[i, j], expected, rtol=1e-9)


@torch.no_grad()
def test_at_full_rank_an_expert_is_itself_and_without_one_there_is_the_base() -> None:
    x, states = tokens(3), experts()
    model = route_by_subspaces(block(0), states, rank=0)
    assert set(routed_layers(model)) == {"attention.in_proj", "attention.out_proj", "fc", "out"}
    for name, state in states.items():
        with forcing(model, name):
            assert torch.allclose(model(x), plain(state)(x), rtol=1e-9)
    with forcing(model, None):
        assert torch.allclose(model(x), block(0)(x), rtol=1e-9)
    alone = route_by_subspaces(block(0), {"cars": states["cars"]}, rank=0)
    assert torch.allclose(alone(x), plain(states["cars"])(x), rtol=1e-9), "one expert has every token"
    twice = route_by_subspaces(block(0), {"a": states["cars"], "b": states["cars"]}, rank=0, top_k=2)
    assert torch.allclose(twice(x), alone(x), rtol=1e-9)


@torch.no_grad()
def test_tokens_go_where_their_inputs_lie() -> None:
    """Each expert changed what another half of the inputs does."""
    W0 = rows(6, 8)
    halves = [
        torch.cat([rows(6, 4, seed=1), torch.zeros(6, 4)], 1),
        torch.cat([torch.zeros(6, 4), rows(6, 4, seed=2)], 1),
    ]
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    model[0].weight.data = W0.clone()
    states = {n: {"0.weight": W0 + d} for n, d in zip(("left", "right"), halves, strict=True)}
    route_by_subspaces(model, states, gate=4, rank=4)
    x = torch.cat([3 * rows(20, 4, seed=5), 0.1 * rows(20, 4, seed=6)], 1)
    with recording(model) as record:
        y = model(x)
    assert record.shares("0") == {"left": 1.0, "right": 0.0}
    assert torch.allclose(y, x @ (W0 + halves[0]).T, rtol=1e-9)
    with recording(model) as record:
        model(x.roll(4, 1))
    assert record.accuracy("right") == 1.0


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_the_size_of_updates_chooses_nothing(size: float) -> None:
    x, W0 = rows(6, 8), torch.zeros(5, 8).double()
    D = [rows(5, 8, seed=1), rows(5, 8, seed=2)]

    def made(factors: tuple[float, float]) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 5, bias=False)).double()
        model[0].weight.data = W0.clone()
        return route_by_subspaces(model, {str(t): {"0.weight": f * D[t]} for t, f in enumerate(factors)}, gate=2)

    assert torch.allclose(made((size, size))(x), size * made((1.0, 1.0))(x), rtol=1e-9)
    chosen = []
    for factors in ((size, 1.0), (1.0, 1.0)):
        model = made(factors)
        with recording(model) as record:
            model(x)
        chosen.append(record.chosen("0").tolist())
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) == {0, 1}


def test_rank_is_the_layer_s_at_most_and_what_nobody_changed_stays() -> None:
    states = experts()
    for state in states.values():
        state["fc.weight"] = block(0).state_dict()["fc.weight"]
    model = route_by_subspaces(block(0), states, rank=99, gate=3, layers=["fc*", "out*", "*in_proj_weight"])
    found = routed_layers(model)
    assert {n: tuple(m.A.shape) for n, m in found.items()} == {"attention.in_proj": (2, 8, 8), "out": (2, 3, 12)}
    assert all(m.router.get_buffer("V").shape[1] == 3 for m in found.values())
    # experts and routers count as what they are
    own = sum(m.weight.numel() for m in model.modules() if hasattr(m, "in_features"))
    more = 8 * (8 + 24) + 2 * 3 * 8 + 3 * (12 + 3) + 2 * 3 * 12
    assert forward_multiplier(model) == pytest.approx(1 + more / own)


@torch.no_grad()
def test_an_expert_of_lower_rank_and_one_that_changed_nothing() -> None:
    base = block(0).state_dict()
    states = {"low": dict(base), "none": dict(base)}
    states["low"]["fc.weight"] = base["fc.weight"] + torch.outer(rows(12), rows(8, seed=1))
    model = route_by_subspaces(block(0), states, gate=4)
    x = tokens(3)
    assert list(routed_layers(model)) == ["fc"]
    # whatever has anything along the one direction goes to the expert that has it
    assert torch.allclose(model(x), plain(states["low"])(x), rtol=1e-9)


@torch.no_grad()
def test_a_folder_comes_back(tmp_path: Path) -> None:
    model = route_by_subspaces(block(0), experts(), rank=2, gate=3, top_k=2)
    save_routed(model, tmp_path / "routed")
    back = load_routed(tmp_path / "routed", block(7))
    x = tokens(4)
    assert torch.equal(back(x), model(x))
    assert all(m.router.options == {"top_k": 2} and m.C is not None for m in routed_layers(back).values())


def test_refusals(tmp_path: Path) -> None:
    same = {"a": block(0).state_dict()}
    with pytest.raises(InputError, match=r"no linear layer that fits \* differs from the base's"):
        route_by_subspaces(block(0), same)
    with pytest.raises(InputError, match="fits conv differs"):
        route_by_subspaces(block(0), experts(), layers="conv")
    other = experts()
    other["cars"]["out.weight"] = torch.zeros(5, 12)
    with pytest.raises(InputError, match=r"cars has no tensor out.weight of shape \[3, 12\]: leave that layer out"):
        route_by_subspaces(block(0), other)
    for options, said in (
        ({"rank": -1}, "rank of smile"),
        ({"gate": 0}, "gate of smile"),
        ({"top_k": 0}, "top_k of smile"),
    ):
        with pytest.raises(InputError, match=said):
            route_by_subspaces(block(0), experts(), **options)
    said = "smile keeps experts in one model: polytask.merging.route_by_subspaces makes it"
    with pytest.raises(InputError, match=said):
        make("smile")


FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@torch.no_grad()
def test_the_command_writes_a_folder_that_loads_and_needs_no_data(tmp_path: Path) -> None:
    def net(seed: int, classes: int = 3) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))

    (tmp_path / "net.py").write_text(FACTORY)
    states = {"base": net(0).state_dict(), "cars": net(1, 5).state_dict(), "digits": net(2, 4).state_dict()}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{n}.safetensors" for n in states]
    command = ["merge", *paths, "--method", "smile", "--set", "rank=3", "--set", "gate=2", "--skip", "2.*"]
    command = [str(a) for a in [*command, "--model", f"{tmp_path}/net.py:net", "--out", tmp_path / "out"]]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "smile of 2 models with routed experts" in done.output
    back = load_routed(tmp_path / "out", net(5))
    of_first = {t: {n: v for n, v in states[t].items() if n.startswith("0.")} for t in ("cars", "digits")}
    expected = route_by_subspaces(net(0), of_first, rank=3, gate=2)
    x = torch.randn(9, 6)
    assert torch.allclose(back(x), expected(x), rtol=1e-5)
    with forcing(back, None):
        assert torch.allclose(back(x), net(0)(x), rtol=1e-5)


def test_a_model_is_for_those_who_run_it(tmp_path: Path) -> None:
    for name in ("base", "one"):
        save_file({"w": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{n}.safetensors") for n in ("base", "one")]
    done = CliRunner().invoke(app, ["merge", *paths, "--method", "ties", "--model", "net.py:net", "--dry-run"])
    assert (done.exit_code, "a model without inputs to run tells nothing" in done.stderr) == (2, True)


def test_patterns_that_begin_with_a_star_and_names_given_twice(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "other").mkdir()
    for seed, name in enumerate(("base", "one", "other/one")):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{n}.safetensors") for n in ("base", "one", "other/one")]
    command = ["merge", *paths[:2], "--method", "smile", "--set", "layers=*0.weight,2.bias", "--set", "rank=2"]
    command += ["--model", f"{tmp_path}/net.py:net", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert set(routed_layers(load_routed(tmp_path / "out", net))) == {"0"}
    twice = CliRunner().invoke(app, ["merge", *paths, "--method", "smile", "--dry-run"])
    assert (twice.exit_code, "two experts are called one" in twice.stderr) == (2, True)

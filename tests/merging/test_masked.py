"""Experts packed as one task vector and a mask each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from polytask.cli import app
from polytask.errors import InputError, StorageError
from polytask.merging import MaskedExperts, merge, pack
from polytask.merging.masking import Masking
from polytask.registry import Method, methods

from .conftest import distance, family

MASKINGS = {m.name: m for m in methods("merging") if issubclass(m.factory, Masking)}


@pytest.fixture(params=MASKINGS.values(), ids=MASKINGS)
def masking(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


def test_one_expert_comes_back(masking: Method) -> None:
    base, (expert,) = family(1)
    assert distance(pack(base, {"only": expert}, masking.name).expert("only"), expert) < 1e-12


def test_experts_that_touch_different_entries_come_back(masking: Method) -> None:
    base, experts = family(3, seed=1)
    g = torch.Generator().manual_seed(0)
    owner = {n: torch.randint(0, 3, v.shape, generator=g) for n, v in base.items() if v.is_floating_point()}
    apart = [
        {n: torch.where(owner[n] == t, e[n], base[n]) if n in owner else e[n] for n in base}
        for t, e in enumerate(experts)
    ]
    packed = pack(base, apart, masking.name)
    for t, e in enumerate(apart, 1):
        assert distance(packed.expert(f"expert {t}"), e) < 1e-12


def test_emr_brings_experts_nearer_to_their_own_than_the_mean_does() -> None:
    base, experts = family(4, seed=2)
    packed = pack(base, experts, "emr")
    floats = [n for n in base if base[n].is_floating_point()]
    for t, e in enumerate(experts, 1):
        found = packed.expert(f"expert {t}")
        missed = sum(float((found[n] - e[n]).square().sum()) for n in floats)
        assert missed < sum(float((sum(o[n] for o in experts) / 4 - e[n]).square().sum()) for n in floats)


def test_tall_at_threshold_one_takes_the_sum_or_the_base_whichever_is_nearer() -> None:
    base, experts = family(4, seed=2)
    packed = pack(base, experts, "tall", threshold=1.0)
    for t, e in enumerate(experts, 1):
        found = packed.expert(f"expert {t}")
        for n in ("first.weight", "last.weight"):
            total = sum(o[n] - base[n] for o in experts)
            nearest = torch.minimum((e[n] - base[n]).abs(), (total - (e[n] - base[n])).abs())
            assert torch.allclose((found[n] - e[n]).abs(), nearest, rtol=1e-9, atol=1e-12)


def test_permutation_and_scale(masking: Method) -> None:
    base, experts = family(3, seed=3)
    names = ["a", "b", "c"]
    packed = pack(base, dict(zip(names, experts, strict=True)), masking.name)
    turned = pack(base, dict(reversed(list(zip(names, experts, strict=True)))), masking.name)
    further = [{n: v + 7 * (e[n] - v) if v.is_floating_point() else v for n, v in base.items()} for e in experts]
    far = pack(base, dict(zip(names, further, strict=True)), masking.name)
    for name in names:
        one = packed.expert(name)
        assert distance(turned.expert(name), one) < 1e-12
        away = {n: (v - base[n]) / 7 + base[n] for n, v in far.expert(name).items() if v.is_floating_point()}
        assert all(torch.allclose(away[n], one[n], rtol=1e-9, atol=1e-9) for n in away)


def test_emr_is_its_formula() -> None:
    base, experts = family(3, seed=4)
    name = "last.weight"
    D = torch.stack([e[name] - base[name] for e in experts])
    packed = pack({name: base[name]}, [{name: e[name]} for e in experts])
    s = torch.sign(D.sum(0))
    tau = torch.zeros_like(base[name])
    for position in range(tau.numel()):
        agreeing = [float(d.view(-1)[position]) for d in D if float(d.view(-1)[position] * s.view(-1)[position]) > 0]
        tau.view(-1)[position] = max(agreeing, key=abs)
    for t, d in enumerate(D, 1):
        mask = d * tau > 0
        part = d.abs().sum() / (mask * tau).abs().sum() * mask * tau
        assert torch.allclose(packed.expert(f"expert {t}")[name], base[name] + part, rtol=1e-12, atol=1e-12)


def test_heads_stay_each_expert_s_own(masking: Method) -> None:
    base, experts = family(2, seed=5)
    experts = [
        {**{n: v for n, v in e.items() if n != "last.weight"}, "last.weight": torch.randn(t + 2, 24)}
        for t, e in enumerate(experts)
    ]
    packed = pack(base, experts, masking.name, skip=["last.*"])
    assert [tuple(packed.expert(f"expert {t}")["last.weight"].shape) for t in (1, 2)] == [(2, 24), (3, 24)]


def test_a_folder_comes_back_bit_by_bit(masking: Method, tmp_path: Path) -> None:
    base, experts = family(3, seed=6, dtype=torch.float32)
    packed = pack(base, {"cars": experts[0], "a/b": experts[1], "ü": experts[2]}, masking.name)
    packed.save(tmp_path / "packed")
    read = MaskedExperts.load(tmp_path / "packed")
    for name in packed.masks:
        mine, theirs = packed.expert(name), read.expert(name)
        assert sorted(mine) == sorted(theirs)
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert not list(tmp_path.glob(".*"))
    # T bits a parameter beside two models
    floats = sum(v.numel() for v in base.values() if v.is_floating_point())
    assert packed.bytes < 8 * floats + 3 * (floats / 8 + 64) + 100


def test_bad_input(tmp_path: Path, masking: Method) -> None:
    base, experts = family(2)
    with pytest.raises(InputError, match="no expert was given"):
        pack(base, [], masking.name)
    with pytest.raises(InputError, match="has no option 'density'"):
        pack(base, experts, masking.name, density=0.2)
    with pytest.raises(InputError, match=r"first.bias.*NaN|NaN.*first.bias"):
        pack(
            base,
            [experts[0], {**experts[1], "first.bias": torch.full((24,), torch.nan, dtype=torch.float64)}],
            masking.name,
        )
    packed = pack(base, experts, masking.name)
    with pytest.raises(InputError, match="there is no expert 'x' here; there are expert 1, expert 2"):
        packed.expert("x")
    packed.save(tmp_path / "p")
    with pytest.raises(InputError, match="exists already"):
        packed.save(tmp_path / "p")
    with pytest.raises(InputError, match="holds no experts packed with masks"):
        MaskedExperts.load(tmp_path)
    (tmp_path / "p" / "masks.safetensors").write_bytes((tmp_path / "p" / "masks.safetensors").read_bytes()[:-10])
    with pytest.raises(StorageError):
        MaskedExperts.load(tmp_path / "p")


def with_heads(experts: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{**e, "last.weight": torch.randn(t + 2, 24)} for t, e in enumerate(experts)]


@pytest.mark.parametrize("whose", ["cars", "digits"])
def test_merging_for_one_expert_is_packing_and_unpacking(masking: Method, whose: str, tmp_path: Path) -> None:
    base, experts = family(2, seed=7, dtype=torch.float32)
    named = dict(zip(("cars", "digits"), with_heads(experts), strict=True))
    expected = pack(base, named, masking.name, skip=["last.*"]).expert(whose)
    found = merge(base, named, masking.name, skip="last.*", expert=whose)
    assert distance(found, expected) < 1e-6
    for name, state in {"base": base, **named}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
    settings = ("--method", masking.name, "--set", f"expert={whose}", "--skip", "last.*", "--out", tmp_path / "out")
    done = CliRunner().invoke(app, ["merge", *(str(tmp_path / n) for n in ("base", *named)), *map(str, settings)])
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[n], v) for n, v in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"of": whose}


def test_whose_model(masking: Method) -> None:
    base, experts = family(2)
    named = dict(zip(("cars", "digits"), experts, strict=True))
    with pytest.raises(InputError, match="there is no expert 'boats'; there are cars, digits"):
        merge(base, named, masking.name, expert="boats")
    with pytest.raises(InputError, match="there is no expert 2 among 2"):
        merge(base, named, masking.name, expert=2)
    with pytest.raises(InputError, match="keeps no masks of all experts"):
        pack(base, named, masking.name, expert="cars")
    with pytest.raises(InputError, match="ties keeps no masks of all experts"):
        pack(base, named, "ties")

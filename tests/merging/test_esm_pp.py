"""ESM++: experts for what merging lost, exact at full rank, each sample routed by its own inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from polytask.cli import app
from polytask.errors import InputError
from polytask.merging import forcing, gather_gramians, load_routed, merge, recording, route_by_prototypes
from polytask.merging.routed import routed_layers

from .test_proxy import build, inputs, place  # noqa: F401


class Block(nn.Module):
    """Attention and an MLP over tokens, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.out(self.fc(x).relu().mean(1))
        return y


def block(seed: int) -> Block:
    torch.manual_seed(seed)
    return Block().eval().double()


def tokens(seed: int, rows: int = 40) -> Tensor:
    """Samples of five tokens around a mean of their own."""
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(8, generator=g).double() + torch.randn(rows, 5, 8, generator=g).double()


TRAINED = {"cars": 1, "digits": 2}
ROUTED = ["attention.in_proj_weight", "fc.weight"]


def routed(rank: int = 99, layers: list[str] | str = ("*in_proj_weight", "fc*")) -> Block:  # type: ignore[assignment]
    experts = {n: block(s) for n, s in TRAINED.items()}
    seen = [gather_gramians(m, [tokens(s)]) for m, s in zip(experts.values(), TRAINED.values(), strict=True)]
    states = {n: m.state_dict() for n, m in experts.items()}
    merged = block(0)
    merged.load_state_dict(merge(block(0).state_dict(), states, "esm", statistics=seen))
    route_by_prototypes(merged, states, seen, rank=rank, layers=layers)
    return merged


def test_an_oracle_of_full_rank_has_the_expert_s_weights() -> None:
    model, plain = routed(), routed()
    for name, seed in TRAINED.items():
        expert = block(seed).state_dict()
        with torch.no_grad(), forcing(model, name):
            expected = block(0)
            state = {n: t for n, t in model.state_dict().items() if n in expected.state_dict()}
            for old, new in (
                ("attention.in_proj.weight", ROUTED[0]),
                ("attention.in_proj.bias", "attention.in_proj_bias"),
            ):
                state[new] = model.state_dict()[old]
            state |= {n: expert[n] for n in ROUTED}
            expected.load_state_dict(state)
            x = tokens(9)
            assert torch.allclose(model(x), expected(x), rtol=1e-9)
    with torch.no_grad(), forcing(plain, None):
        assert not torch.allclose(plain(x), expected(x), rtol=0.1)


def test_prototypes_know_their_own_and_route_each_sample_alone() -> None:
    model = routed(rank=2)
    mixed = torch.cat([tokens(1, 6), tokens(2, 6)])
    with torch.no_grad(), recording(model) as record:
        together = model(mixed)
    first = record.chosen("attention.in_proj")
    assert first.tolist() == [0] * 6 + [1] * 6
    with torch.no_grad():
        alone = torch.cat([model(x[None]) for x in mixed])
    assert torch.allclose(together, alone, rtol=1e-9)
    for low in routed_layers(model).values():
        assert low.A.shape[1] == 2
    with recording(model) as record, torch.no_grad():
        model(tokens(2))
    assert record.shares("attention.in_proj")["digits"] > 0.9


def test_ranks_share_the_outputs_when_none_is_named() -> None:
    assert {n: m.A.shape[1] for n, m in routed_layers(routed(rank=0)).items()} == {"attention.in_proj": 8, "fc": 6}
    # rank is limited by the layer
    assert {n: m.A.shape[1] for n, m in routed_layers(routed()).items()} == {"attention.in_proj": 8, "fc": 8}


def test_bad_input() -> None:
    with pytest.raises(InputError, match="fits conv: no layer gets experts"):
        routed(layers="conv")
    states = {n: block(s).state_dict() for n, s in TRAINED.items()}
    seen = [gather_gramians(block(s), [tokens(s)]) for s in TRAINED.values()]
    with pytest.raises(InputError, match="a statistic of each of the 2 experts, and 1 were given"):
        route_by_prototypes(block(0), states, seen[:1])
    states["cars"] = states["cars"] | {"out.weight": torch.zeros(5, 12)}
    with pytest.raises(InputError, match=r"cars has no tensor out.weight of shape \[3, 12\]: leave that layer out"):
        route_by_prototypes(block(0), states, seen)


def test_the_command_writes_a_folder_that_loads(place: Path) -> None:  # noqa: F811
    models = [place / n for n in ("base", "cars", "digits")]
    arguments = ["merge", *models, "--method", "esm++", "--set", "rank=3", "--set", "layers=0*", "--set", "scale=0.5"]
    arguments += ["--proxy", place / "data", "--model", f"{place}/net.py:net", "--out", place / "out"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert "with routed experts" in done.output
    names = ["experts.safetensors", "merge.json", "model.safetensors", "routing.json"]
    assert sorted(p.name for p in (place / "out").iterdir()) == names
    assert json.loads((place / "out/merge.json").read_text())["routing"] == {
        "method": "esm_pp",
        "rank": 3,
        "layers": ["0*"],
    }
    loaded = load_routed(place / "out", build(5)).eval()
    experts = {"cars": build(1), "digits": build(2)}
    seen = [gather_gramians(m, [inputs(i)]) for i, m in enumerate(experts.values(), 1)]
    states = {n: m.state_dict() for n, m in experts.items()}
    merged = build(0)
    merged.load_state_dict(merge(build(0).state_dict(), states, "esm", statistics=seen, scale=0.5))
    expected = route_by_prototypes(merged, states, seen, rank=3, layers="0*")
    with torch.no_grad():
        assert torch.allclose(loaded(inputs(7)), expected(inputs(7)), atol=1e-4)


def test_sharded_transformers_folders_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    for i, name in enumerate(("base", "one", "two")):
        torch.manual_seed(i)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / name, max_shard_size="4KB")
    save_file({"pixel_values": torch.randn(10, 3, 8, 8)}, tmp_path / "pixels.safetensors")
    models = [tmp_path / n for n in ("base", "one", "two")]
    arguments = [
        "merge",
        *models,
        "--method",
        "esm_pp",
        "--proxy",
        tmp_path / "pixels.safetensors",
        "--out",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    loaded = load_routed(tmp_path / "out", transformers.ViTForImageClassification(config)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), forcing(loaded, "two"):
        found = loaded(pixel_values=x).logits
    merged = loaded.state_dict()
    two = transformers.ViTForImageClassification.from_pretrained(tmp_path / "two")
    state = {
        n: two.state_dict()[n] if n.removesuffix(".weight") in routed_layers(loaded) else merged[n]
        for n in two.state_dict()
    }
    two.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(found, two.eval()(pixel_values=x).logits, atol=1e-4)


def test_heads_that_differ_stay_out(tmp_path: Path) -> None:
    def vit(classes: int, seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return ViTForImageClassification(
            ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=classes)
        )

    for seed, (name, classes) in enumerate({"base": 2, "cars": 3, "digits": 5}.items()):
        vit(classes, seed).save_pretrained(tmp_path / name)
    pictures = torch.randn(12, 1, 8, 8)
    save_file({"pixel_values": pictures}, tmp_path / "seen.safetensors")
    arguments = ["merge", *(tmp_path / n for n in ("base", "cars", "digits")), "--method", "esm_pp", "--set", "rank=2"]
    arguments += ["--skip", "classifier*", "--proxy", tmp_path / "seen.safetensors", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    loaded = load_routed(tmp_path / "out", vit(2, 7)).eval()
    assert not [n for n in routed_layers(loaded) if "classifier" in n]
    assert loaded(pixel_values=pictures).logits.shape == (12, 2)

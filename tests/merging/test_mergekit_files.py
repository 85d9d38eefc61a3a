"""What mergekit's files say beyond the obvious, as mergekit 0.1.5 was seen to take it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import make, merge
from polytask.merging.config import read_config
from polytask.merging.on_disk import MergePlan, write

from .conftest import State, distance

NAMES = ("embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "layers.2.attn.weight", "lm_head.weight")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, State]:
    """Three models of three layers as safetensors files, by name."""
    found = {}
    for seed, name in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(seed)
        found[name] = {n: torch.randn(5, 7, generator=g, dtype=torch.float64) for n in NAMES}
        save_file(found[name], tmp_path / f"{name}.safetensors")
    return found


def planned(folder: Path, text: str) -> MergePlan:
    (folder / "merge.yml").write_text(re.sub(r"(model|source): (base|a|b)\b", r"\1: \2.safetensors", text))
    return read_config(folder / "merge.yml")


def written(folder: Path, text: str) -> State:
    write(planned(folder, text), folder / "out")
    return load_file(folder / "out" / "model.safetensors")


TWO = "models: [{model: a}, {model: b}]\n"
WEIGHTED = "models: [{model: base, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 2.0}}]\n"


def test_the_base_of_a_mean_is_one_more_model(models: dict[str, State], tmp_path: Path) -> None:
    listed = WEIGHTED + "base_model: base\nmerge_method: linear\n"
    expected = merge(None, [models["base"], models["b"]], "weighted", weights=[0.5, 2.0])
    assert distance(written(tmp_path, listed), expected) < 1e-12
    plan = planned(tmp_path, TWO + "base_model: base\nmerge_method: karcher\n")
    assert [e.stem for e in plan.experts] == ["base", "a", "b"]
    text = "models: [{model: a, parameters: {weight: 1}}]\nbase_model: base\nmerge_method: linear\n"
    with pytest.raises(InputError, match="'weight' for some models only"):
        planned(tmp_path, text)


def test_a_sphere_around_the_base(models: dict[str, State], tmp_path: Path) -> None:
    found = written(tmp_path, TWO + "base_model: base\nmerge_method: multislerp\nparameters: {eps: 1e-9}\n")
    W0, *experts = models["base"], models["a"], models["b"]
    apart = [{n: e[n] - W0[n] for n in NAMES} for e in experts]
    expected = {n: W0[n] + v for n, v in merge(None, apart, "multislerp").items()}
    assert distance(found, expected) < 1e-12
    assert distance(merge(W0, experts, "multislerp", around_base=True), expected) < 1e-12
    with pytest.raises(InputError, match="around the base needs the base"):
        merge(None, experts, "multislerp", around_base=True)


def test_weights_are_taken_as_they_are_where_the_file_says_so(models: dict[str, State], tmp_path: Path) -> None:
    weights = "models: [{model: a, parameters: {weight: 0.4}}, {model: b, parameters: {weight: 0.2}}]\n"
    text = weights + "merge_method: multislerp\nparameters: {normalize_weights: false}\n"
    half = merge(None, [models["a"], models["b"]], "multislerp", weights=[0.4, 0.2])
    assert distance({n: 0.6 * v for n, v in half.items()}, written(tmp_path, text)) < 1e-12
    plan = planned(tmp_path, text)
    assert plan.options("embed.weight") == {"weights": [0.4, 0.2], "normalize": False}


def test_task_arithmetic_normalizes_if_told(models: dict[str, State], tmp_path: Path) -> None:
    weights = "models: [{model: a, parameters: {weight: 3}}, {model: b, parameters: {weight: 1}}]\n"
    text = weights + "base_model: base\nmerge_method: task_arithmetic\nparameters: {normalize: 1.0}\n"
    expected = {n: 0.75 * models["a"][n] + 0.25 * models["b"][n] for n in NAMES}
    assert distance(written(tmp_path, text), expected) < 1e-12
    kept = merge(models["base"], [models["a"], models["b"]], weights=[1.0, -1.0], scale=1.0, normalize=True)
    assert distance(kept, merge(models["base"], [models["a"], models["b"]], weights=[1.0, -1.0], scale=1.0)) < 1e-12


def test_parameters_of_a_slice_count_between_those_of_a_model_and_of_the_file(
    models: dict[str, State], tmp_path: Path
) -> None:
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3], parameters: {weight: 5}}]
    parameters: {weight: 2}
merge_method: linear
parameters: {weight: 7, normalize: false}
"""
    assert planned(tmp_path, text).options("embed.weight") == {"weights": [2, 5], "normalize": False}


def test_only_layers_stand_along_a_gradient(models: dict[str, State], tmp_path: Path) -> None:
    text = TWO + "base_model: base\nmerge_method: task_arithmetic\nparameters: {lambda: [0, 1], weight: 1}\n"
    plan = planned(tmp_path, text)
    assert [plan.options(n)["scale"] for n in NAMES] == [0.0, 0.0, 0.5, 1.0, 0.0]


def test_what_is_said_of_some_models_is_the_default_for_others(models: dict[str, State], tmp_path: Path) -> None:
    one = "models: [{model: a, parameters: {density: 0.3}}, {model: b}]\nbase_model: base\n"
    assert planned(tmp_path, one + "merge_method: ties\n").options("embed.weight")["density"] == [0.3, 1.0]
    assert planned(tmp_path, one + "merge_method: della\n").options("embed.weight")["epsilon"] == 0.3
    karcher = planned(tmp_path, TWO + "merge_method: karcher\n").options("embed.weight")
    assert karcher == {"steps": 10, "tolerance": 1e-5}


def test_numbers_that_yaml_reads_as_text(models: dict[str, State], tmp_path: Path) -> None:
    assert make("karcher", tolerance="1e-5").tolerance == 1e-5  # type: ignore[attr-defined]
    assert make("weighted", weights=["1e-1", 2]).weights == [0.1, 2]  # type: ignore[attr-defined]
    text = TWO + "merge_method: karcher\nparameters: {tol: 1e-9, max_iter: 50}\n"
    assert distance(written(tmp_path, text), merge(None, [models["a"], models["b"]], "karcher", steps=50)) < 1e-9


def test_one_text_is_a_list_of_one(models: dict[str, State], tmp_path: Path) -> None:
    plan = planned(tmp_path, TWO + "base_model: base\nmerge_method: ties\nfilters: trim:density=0.5\nskip: lm_head.*\n")
    assert (plan.filters, plan.skip) == (("trim:density=0.5",), ("lm_head.*",))


def test_one_model_s_tokenizer(models: dict[str, State], tmp_path: Path) -> None:
    text = TWO + "base_model: base\nmerge_method: ties\ntokenizer: {source: b}\n"
    assert planned(tmp_path, text).tokenizer == tmp_path / "b.safetensors"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{model: a, weight: 0.5}]\nmerge_method: linear\n", "'weight' of a model, not among its parameters"),
        ("models: [{model: a, parameters: [1]}]\nmerge_method: linear\n", r"gives parameters as \[1\]"),
        ("models: {model: a}\nmerge_method: linear\n", "models in .* are not a list"),
        ("models: [{model: base}]\nbase_model: base\nmerge_method: ties\n", "no model but the base"),
        (TWO + "merge_method: linear\nskip: {a: 1}\n", "skip in .* is a list of texts"),
        (TWO + "merge_method: linear\ntokenizer: {source: union, tokens: {}}\n", "only one model's can be taken"),
        (TWO + "merge_method: emr\n", "emr keeps experts apart: say whose"),
    ],
)
def test_what_cannot_be_meant(models: dict[str, State], tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, text).options("embed.weight")


# --- what the methods do where mergekit's own do it too


def of(name: str, W: list[list[float]], W0: list[float], **options: Any) -> Tensor:
    state = [{"w": torch.tensor(w, dtype=torch.float64)} for w in (W0, *W)]
    return merge(state[0], state[1:], name, **options)["w"]


def test_model_stock_goes_back_where_experts_disagree() -> None:
    W = [[1.0, 0.0], [-0.6, 0.8]]
    cosine = -0.6
    expected = 2 * cosine / (1 + cosine) * torch.tensor(W).double().mean(0)
    assert torch.allclose(of("model_stock", W, [0.0, 0.0]), expected)
    # where they cancel out there is no such ratio
    assert of("model_stock", [[1.0, 2.0], [-1.0, -2.0]], [0.0, 0.0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["karcher", "multislerp", "slerp"])
def test_opposite_directions_are_averaged(name: str) -> None:
    assert of(name, [[2.0], [-1.0]], [9.0]).tolist() == [0.5]
    assert of(name, [[2.0, 4.0], [-1.0, -2.0]], [9.0, 9.0]).tolist() == [0.5, 1.0]
    if name != "slerp":
        assert of(name, [[2.0], [-1.0]], [9.0], weights=[0.25, 0.75]).tolist() == pytest.approx([-1.25])
        assert of(name, [[2.0], [-1.0], [3.0], [-4.0]], [9.0]).tolist() == [0.0]

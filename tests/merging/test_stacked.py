"""Layers put together from slices of models, as mergekit's files tell it; mergekit 0.1.5 gives the same on files like these."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.merging import merge
from polytask.merging.config import read_config
from polytask.merging.on_disk import MergePlan, write

from .conftest import State, distance

transformers = pytest.importorskip("transformers")

IDS: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(layers: int = 4, width: int = 16, **more: Any) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(hidden_size=width, num_hidden_layers=layers, **heads, **IDS, **more)
    return transformers.LlamaForCausalLM(config)


def gpt(layers: int = 3) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=layers, n_head=2, **IDS))


def gemma(layers: int = 4) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4}
    config = transformers.Gemma2Config(hidden_size=16, num_hidden_layers=layers, sliding_window=3, **heads, **IDS)
    return transformers.Gemma2ForCausalLM(config)


def neo(layers: int = 3) -> nn.Module:
    kinds = {"attention_types": [[["local"], 1], [["global", "local"], 1]], "window_size": 3}
    config = transformers.GPTNeoConfig(
        hidden_size=16, num_layers=layers, num_heads=2, intermediate_size=24, **kinds, **IDS
    )
    return transformers.GPTNeoForCausalLM(config)


def saved(make: Callable[[], nn.Module], folder: Path, seed: int = 0) -> nn.Module:
    """A model with weights that are far from zero, and from where they begin."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def models(tmp_path: Path) -> dict[str, State]:
    """Llamas of four layers, by name."""
    for seed, name in enumerate(("base", "a", "b")):
        saved(llama, tmp_path / name, seed)
    return {name: load_file(tmp_path / name / "model.safetensors") for name in ("base", "a", "b")}


def planned(folder: Path, text: str) -> MergePlan:
    (folder / "merge.yml").write_text(text)
    return read_config(folder / "merge.yml")


def written(folder: Path, text: str) -> State:
    write(planned(folder, text), folder / "out")
    return load_file(folder / "out" / "model.safetensors")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 15).reshape(2, 6)).logits
    return found


def layer(state: State, i: int, of: str = "model.layers") -> State:
    return {n.removeprefix(f"{of}.{i}."): v for n, v in state.items() if n.startswith(f"{of}.{i}.")}


def outside(state: State) -> State:
    return {n: v for n, v in state.items() if "layers" not in n}


FRANKEN = """
slices:
  - sources: [{model: ./a, layer_range: [0, 3]}]
  - sources: [{model: ./b, layer_range: [1, 4]}]
merge_method: passthrough
"""


def test_layers_of_two_models_in_a_row(models: dict[str, State], tmp_path: Path) -> None:
    found = written(tmp_path, FRANKEN)
    a, b = models["a"], models["b"]
    for i, (model, k) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        ours, theirs = layer(found, i), layer(model, k)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], v) for n, v in theirs.items())
    assert not layer(found, 6)
    # the first slice's model has the first word, the last slice's the last
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], b["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 6
    one, two = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / n) for n in "ab")
    one.model.layers = nn.ModuleList([*one.model.layers[:3], *two.model.layers[1:]])
    one.model.norm, one.lm_head = two.model.norm, two.lm_head
    for i, block in enumerate(one.model.layers):
        block.self_attn.layer_idx = i
    one.config.num_hidden_layers = 6
    assert torch.equal(logits(loaded), logits(one))
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert [s["starts"] for s in record["slices"]] == [[0], [1]]


IDENTITY = """
slices:
  - sources: [{model: ./m, layer_range: [0, 2]}]
  - sources:
      - model: ./m
        layer_range: [1, 3]
        parameters:
          scale: [{filter: FIRST, value: 0.0}, {filter: SECOND, value: 0.0}, {value: 1.0}]
  - sources: [{model: ./m, layer_range: [2, 3]}]
merge_method: passthrough
"""


@pytest.mark.parametrize(
    ("make", "first", "second", "count"),
    [
        (lambda: llama(3), "o_proj", "down_proj", "num_hidden_layers"),
        (gpt, "attn.c_proj", "mlp.c_proj", "n_layer"),
        (lambda: gemma(3), "o_proj", "down_proj", "num_hidden_layers"),
        (neo, "out_proj", "mlp.c_proj", "num_layers"),
    ],
    ids=["llama", "gpt", "gemma", "neo"],
)
def test_blocks_that_add_nothing_change_nothing(
    make: Callable[[], nn.Module], first: str, second: str, count: str, tmp_path: Path
) -> None:
    model = saved(make, tmp_path / "m")
    write(planned(tmp_path, IDENTITY.replace("FIRST", first).replace("SECOND", second)), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said[count] == 5
    if "layer_types" in said:  # sliding and full attention in turn, each layer as it was
        before = json.loads((tmp_path / "m/config.json").read_text())["layer_types"]
        assert len(set(before)) == 2
        assert said["layer_types"] == [before[i] for i in (0, 1, 1, 2, 2)]
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(saved(make, tmp_path / "other", seed=1)), atol=1e-2)


def test_fewer_layers(models: dict[str, State], tmp_path: Path) -> None:
    text = "slices: [{sources: [{model: ./a, layer_range: [0, 1]}]}, {sources: [{model: ./a, layer_range: [3, 4]}]}]\n"
    found = written(tmp_path, text + "merge_method: passthrough\nbase_model: ./b\ndtype: bfloat16\n")
    assert {n for n in found if "layers.1" in n} == {
        n.replace("layers.3", "layers.1") for n in models["a"] if "rs.3" in n
    }
    assert torch.equal(layer(found, 1)["mlp.up_proj.weight"], layer(models["a"], 3)["mlp.up_proj.weight"].bfloat16())
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (loaded.config.num_hidden_layers, loaded.dtype) == (2, torch.bfloat16)


def test_models_of_a_slice_are_merged(models: dict[str, State], tmp_path: Path) -> None:
    """Gradients run over a slice, filters go by what each model calls its tensor, parameters of a slice come before those of all."""
    text = """
slices:
  - sources: [{model: ./a, layer_range: [0, 2], parameters: {weight: 1}}]
  - sources:
      - {model: ./a, layer_range: [1, 4], parameters: {weight: [0.3, 0.9]}}
      - model: ./b
        layer_range: [0, 3]
        parameters: {weight: [{filter: "layers.1.", value: 2}, {filter: mlp, value: 0.2}, {value: 0.7}]}
    parameters: {normalize: false}
merge_method: linear
parameters: {normalize: true}
"""
    found, a, b = written(tmp_path, text), models["a"], models["b"]
    assert distance(layer(found, 1), layer(a, 1)) < 1e-7
    for i, first in enumerate((0.3, 0.6, 0.9)):
        for n, v in layer(found, 2 + i).items():
            second = 2.0 if i == 1 else 0.2 if "mlp" in n else 0.7
            expected = first * layer(a, 1 + i)[n] + second * layer(b, i)[n]
            assert torch.allclose(v, expected, atol=1e-6)
    for n, v in outside(found).items():
        expected = a[n] if "embed" in n else 0.3 * a[n] + 0.7 * b[n]
        assert torch.allclose(v, expected, atol=1e-6)


def test_task_vectors_are_those_of_each_slice(models: dict[str, State], tmp_path: Path) -> None:
    text = """
slices:
  - sources: [{model: ./base, layer_range: [1, 3]}, {model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [2, 4]}]
    parameters: {density: 0.5, lambda: 0.8}
  - sources: [{model: ./b, layer_range: [0, 1]}, {model: ./base, layer_range: [0, 1]}]
merge_method: ties
base_model: ./base
parameters: {weight: 1.0, density: 0.3}
"""
    found = written(tmp_path, text)
    base, a, b = (models[n] for n in ("base", "a", "b"))
    for i in range(2):
        parts = [layer(base, 1 + i), layer(a, i), layer(b, 2 + i)]
        expected = merge(parts[0], parts[1:], "ties", density=0.5, scale=0.8, weights=1.0)
        assert distance(layer(found, i), expected) < 1e-6
    assert distance(layer(found, 2), merge(layer(base, 0), [layer(b, 0)], "ties", density=0.3, scale=1.0)) < 1e-6
    last = {n: v for n, v in outside(found).items() if "embed" not in n}
    assert distance(last, merge({n: base[n] for n in last}, [{n: b[n] for n in last}], "ties", density=0.3)) < 1e-6


def test_a_base_that_a_slice_does_not_name_has_the_range_of_the_first(models: dict[str, State], tmp_path: Path) -> None:
    text = """
slices:
  - sources: [{model: ./a, layer_range: [1, 3]}, {model: ./b, layer_range: [0, 2]}]
  - sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [3, 4]}]
    base_model: ./a
merge_method: task_arithmetic
base_model: ./base
parameters: {weight: 0.5}
"""
    found, base, a, b = written(tmp_path, text), *(models[n] for n in ("base", "a", "b"))
    for i in range(2):
        W0 = layer(base, 1 + i)
        assert distance(layer(found, i), {n: 0.5 * layer(a, 1 + i)[n] + 0.5 * layer(b, i)[n] for n in W0}) < 1e-6
    assert distance(layer(found, 2), {n: 0.5 * v + 0.5 * layer(b, 3)[n] for n, v in layer(a, 0).items()}) < 1e-6


def test_slerp_from_the_base_whatever_the_order(models: dict[str, State], tmp_path: Path) -> None:
    text = "slices: [{sources: [{model: ./b, layer_range: [0, 2]}, {model: ./a, layer_range: [2, 4]}]}]\n"
    text += "merge_method: slerp\nbase_model: ./a\nparameters: {t: [0.25, 1]}\n"
    found = written(tmp_path, text)
    expected = merge(layer(models["a"], 2), [layer(models["b"], 0)], "slerp", t=0.25)
    assert distance(layer(found, 0), expected) < 1e-6
    assert distance(layer(found, 1), layer(models["b"], 1)) < 1e-6


def test_a_base_of_one_whole_slice(models: dict[str, State], tmp_path: Path) -> None:
    ranges = "{model: ./a, layer_range: [0, 4]}, {model: ./b, layer_range: [0, 4]}"
    text = f"slices: [{{sources: [{ranges}], base_model: ./base}}]\nmerge_method: task_arithmetic\n"
    found = written(tmp_path, text + "parameters: {weight: 0.5}\n")
    assert distance(found, {n: (models["a"][n] + models["b"][n]) / 2 for n in found}) < 1e-6


def test_one_model_scaled(models: dict[str, State], tmp_path: Path) -> None:
    text = "models: [{model: ./a, parameters: {scale: [0.5, 2]}}]\nmerge_method: passthrough\n"
    found = written(tmp_path, text)
    for i, scale in enumerate((0.5, 1.0, 1.5, 2.0)):
        assert distance(layer(found, i), {n: scale * v for n, v in layer(models["a"], i).items()}) < 1e-6
    with pytest.raises(InputError, match="passthrough merges one expert alone, not 2"):
        merge(None, [models["a"], models["b"]], "passthrough")


def test_lists_with_an_entry_a_layer_follow_their_layers(tmp_path: Path) -> None:
    said = {
        "a": {
            "n_layers": 2,
            "layer_types": ["x", "y"],
            "eos_token_id": [3, 4],
            "mlp_only_layers": [1],
            "ratio": [7, 8],
        },
        "b": {
            "n_layers": 3,
            "layer_types": ["p", "q", "r"],
            "mlp_only_layers": [0, 2],
            "text_config": {"depth": 3, "a": [1]},
        },
    }
    for name, config in said.items():
        state = {f"h.{i}.weight": torch.ones(2) for i in range(config["n_layers"])}  # type: ignore[call-overload]
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    text = "slices: [{sources: [{model: ./b, layer_range: [1, 3]}]}, {sources: [{model: ./a, layer_range: [0, 2]}]}]\n"
    text += "merge_method: passthrough\n"
    written(tmp_path, text)
    found = json.loads((tmp_path / "out/config.json").read_text())
    layers = {"n_layers": 4, "layer_types": ["q", "r", "x", "y"], "mlp_only_layers": [1, 3]}
    assert found == {**layers, "text_config": {"depth": 4, "a": [1]}}
    with pytest.raises(InputError, match=r"the configuration of .*b has no ratio of layer 2"):
        planned(tmp_path, text + "base_model: ./a\n")
    # as far as it goes, a list that the other model has not is taken to hold there too
    text = text.replace("[1, 3]", "[0, 2]") + "base_model: ./a\n"
    write(planned(tmp_path, text), tmp_path / "other")
    found = json.loads((tmp_path / "other/config.json").read_text())
    layers |= {"layer_types": ["p", "q", "x", "y"], "mlp_only_layers": [0, 3]}
    assert found == {**layers, "eos_token_id": [3, 4], "ratio": [7, 8, 7, 8]}


# --- what else holds of merges on disk


KILLED = """
import os, signal, sys
from pathlib import Path
from polytask.merging.config import read_config
from polytask.merging.on_disk import write
plan = read_config(Path(sys.argv[1]))
object.__setattr__(plan, "shard_size", 6000)
def progress(name):
    if name == "model.layers.3.self_attn.q_proj.weight":
        os.kill(os.getpid(), signal.SIGKILL)
write(plan, Path(sys.argv[2]), progress=progress)
"""


def test_killed_and_started_again(models: dict[str, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path, FRANKEN)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "merge.yml"), str(tmp_path / "out")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    object.__setattr__(plan, "shard_size", 6000)
    finished = json.loads((tmp_path / ".out.merging/journal.json").read_text())["finished"]
    assert 0 < len(finished) < len(plan.files)
    loaded: list[str] = []
    load = MergePlan.load
    monkeypatch.setattr(MergePlan, "load", lambda self, name: loaded.append(name) or load(self, name))
    write(plan, tmp_path / "out")
    assert set(loaded) == {n for f, names in plan.files.items() if f not in finished for n in names}
    found = {n: t for f in plan.files for n, t in load_file(tmp_path / "out" / f).items()}
    write(planned(tmp_path, FRANKEN), tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n], v) for n, v in whole.items())


def test_a_plan_reads_no_weight_and_loads_no_pytorch(models: dict[str, State], tmp_path: Path) -> None:
    planned(tmp_path, FRANKEN)
    program = """
import json, sys
from polytask.cli import app
try:
    app(["merge", "merge.yml", "--dry-run", "--json"])
finally:
    print(sorted(m for m in sys.modules if m.startswith(("torch.", "transformers"))), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ
    )
    plan = json.loads(done.stdout)
    assert done.stderr.strip() == "[]"
    a = models["a"]
    assert plan["merged"] == len(outside(a)) + 6 * len(layer(a, 0))
    assert plan["bytes"] == sum(v.nbytes for v in outside(a).values()) + 6 * sum(v.nbytes for v in layer(a, 0).values())
    # one tensor, and what the method needs beside it
    assert plan["peak_bytes"] == 2 * max(v.nbytes for v in a.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "merge.yml"]


def test_layers_with_an_adapter(models: dict[str, State], tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): A, name.format("B"): B}, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    text = slices("{model: ./a+./lora, layer_range: [1, 3]}", "{model: ./a+./lora, layer_range: [1, 2]}")
    found = written(tmp_path, text)
    for i in (0, 2):
        moved = layer(models["a"], 1)["self_attn.q_proj.weight"] + B @ A
        assert torch.allclose(layer(found, i)["self_attn.q_proj.weight"], moved, atol=1e-6)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 3


def test_what_looks_at_the_whole_model_sees_the_stack(models: dict[str, State], tmp_path: Path) -> None:
    first = "{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [1, 2]}"
    second = "{model: ./b, layer_range: [3, 4]}, {model: ./a, layer_range: [2, 3]}"
    found = written(tmp_path, slices(first, second, method="ties", more=TRIMMED))
    stacked = []
    for one, i, two, k in (("base", 0, "base", 3), ("a", 0, "b", 3), ("b", 1, "a", 2)):
        ends = {n: models[one if "embed" in n else two][n] for n in outside(models[one])}
        both = enumerate((layer(models[one], i), layer(models[two], k)))
        stacked.append(ends | {f"model.layers.{m}.{n}": v for m, part in both for n, v in part.items()})
    expected = merge(stacked[0], stacked[1:], "ties", density=1.0, scale=1.0, filters=["trim:density=0.5,scope=model"])
    assert distance(found, expected) < 1e-6


def test_skipped_layers_are_the_first_model_s(models: dict[str, State], tmp_path: Path) -> None:
    text = "slices: [{sources: [{model: ./a, layer_range: [1, 3]}, {model: ./b, layer_range: [0, 2]}]}]\n"
    found = written(tmp_path, text + "merge_method: average\nskip: ['*.mlp.*']\n")
    for n, v in layer(found, 0).items():
        one, two = layer(models["a"], 1)[n], layer(models["b"], 0)[n]
        assert torch.allclose(v, one if "mlp" in n else (one + two) / 2)


def slices(*ranges: str, method: str = "passthrough", more: str = "") -> str:
    listed = ", ".join(f"{{sources: [{r}]}}" for r in ranges)
    return f"slices: [{listed}]\nmerge_method: {method}\n{more}"


A, OTHER = "{model: ./a, layer_range: [0, 2]}", "{model: ./odd, layer_range: [1, 3]}"
TRIMMED = "base_model: ./base\nfilters: 'trim:density=0.5,scope=model'\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            slices(A, "{model: ./b, layer_range: [2, 5]}"),
            r"merge.yml takes layers \[2, 5\] of ./b, which has 4: a layer_range",
        ),
        (slices(A, "{model: ./b, layer_range: [2, 2]}"), r"takes layers \[2, 2\] of ./b, which has 4"),
        (slices(A, "{model: ./b, layer_range: [-1, 2]}"), r"takes layers \[-1, 2\] of ./b, which has 4"),
        (
            slices(A, "{model: ./b, layer_range: 3}"),
            r"takes layers 3 of ./b: of each model a slice takes a layer_range",
        ),
        (
            slices("{model: ./a, layer_range: [3, 4]}", method="ties", more="base_model: ./tied\n"),
            r"takes layers \[3, 4\] of ./tied, which has 2",
        ),
        (slices(A, "{model: ./b}"), r"takes layers None of ./b: of each model"),
        (
            slices(f"{A}, {{model: ./b, layer_range: [0, 3]}}", method="average"),
            "takes 2 layers of one model and 3 of another",
        ),
        (slices(f"{A}, {A}"), "passthrough merges one expert alone, not 2"),
        (slices(A, A, method="esm"), "esm looks at data with whole models: .*merge.yml takes their layers apart"),
        (slices(A, A, more="slice: 3"), "'slice', which is not known"),
        (slices(A, A, more="parameters: {sclae: 3}"), "sets 'sclae', which passthrough does not take"),
        (
            slices(A, "{model: ./wide, layer_range: [0, 1]}"),
            r"has shape \[.*24.*\] in .*wide, and \[.*16.*\] in .*a: stack models of one width",
        ),
        (slices(A, "{model: ./gpt, layer_range: [0, 1]}"), r"gpt has a tensor transformer.h.0.*, and .*a none like it"),
        (
            slices(A, "{model: ./tied, layer_range: [0, 1]}"),
            r"a has a tensor lm_head.weight, and the other models have not",
        ),
        (slices(A, "{model: ./half, layer_range: [0, 1]}"), "is bfloat16 in .*half and float32 in .*a: name the dtype"),
        (
            slices("{model: ./two, layer_range: [0, 1]}"),
            r"two has 2 stacks of layers \(decoder.block., encoder.block.\)",
        ),
        (
            slices(f"{A}, {{model: ./gpt, layer_range: [0, 2]}}", method="average"),
            "gpt has no tensor model.embed_tokens.weight, which .*a has",
        ),
        (
            slices(f"{A}, {OTHER}", method="average"),
            "layer 0 of .*a and layer 1 of .*odd differ in self_attn.q_proj.bias",
        ),
        (
            slices(A, f"{A}, {{model: ./b, layer_range: [0, 2]}}", method="ties", more=TRIMMED),
            "what looks at the whole model first needs as many models in every slice",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_stacked(models: dict[str, State], tmp_path: Path, text: str, said: str) -> None:
    saved(lambda: llama(2, width=24), tmp_path / "wide")
    saved(lambda: llama(2, tie_word_embeddings=True), tmp_path / "tied")
    saved(lambda: llama(2).bfloat16(), tmp_path / "half")
    saved(gpt, tmp_path / "gpt")
    (tmp_path / "odd").mkdir()
    more = {"model.layers.1.self_attn.q_proj.bias": torch.ones(16)}
    save_file({**models["b"], **more}, tmp_path / "odd/model.safetensors")
    (tmp_path / "two").mkdir()
    two = {f"{part}.block.{i}.weight": torch.ones(2) for part in ("encoder", "decoder") for i in range(2)}
    save_file(two, tmp_path / "two/model.safetensors")
    with pytest.raises(InputError, match=said):
        planned(tmp_path, text)


def test_kinds_of_layers_that_go_by_position(tmp_path: Path) -> None:
    """As in mixtures of experts whose first layers are dense."""
    (tmp_path / "m").mkdir()
    state = {f"h.{i}.{kind}": torch.ones(2) for i, kind in enumerate(("dense", "sparse", "sparse"))}
    save_file(state, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text('{"n_layer": 3, "first_k_dense_replace": 1}')
    deeper = slices("{model: ./m, layer_range: [0, 2]}", "{model: ./m, layer_range: [1, 3]}")
    write(planned(tmp_path, deeper), tmp_path / "out")
    assert list(load_file(tmp_path / "out/model.safetensors")) == [
        "h.0.dense",
        "h.1.sparse",
        "h.2.sparse",
        "h.3.sparse",
    ]
    twice = slices("{model: ./m, layer_range: [0, 1]}", "{model: ./m, layer_range: [0, 2]}")
    with pytest.raises(
        InputError, match=r"layer 0 of .*m is of another kind than layer 1 of .*m, and its config.json has no"
    ):
        planned(tmp_path, twice)
    (tmp_path / "m/config.json").write_text('{"n_layer": 3, "mlp_types": ["dense", "sparse", "sparse"]}')
    write(planned(tmp_path, twice), tmp_path / "other")
    assert json.loads((tmp_path / "other/config.json").read_text())["mlp_types"] == ["dense", "dense", "sparse"]


def test_a_configuration_that_counts_no_layers(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({f"h.{i}.weight": torch.ones(2) for i in range(3)}, tmp_path / "m/model.safetensors")
    text = slices("{model: ./m, layer_range: [0, 2]}")
    write(planned(tmp_path, text), tmp_path / "plain")  # without a configuration there is nothing to change
    (tmp_path / "m/config.json").write_text('{"blocks": 3}')
    with pytest.raises(
        InputError, match=r"m/config.json does not say that there are 3 layers \(num_hidden_layers, n_layer"
    ):
        planned(tmp_path, text)

"""LoRA adapters as experts, against peft's own way of merging them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from polytask.cli import app
from polytask.errors import InputError, StorageError
from polytask.merging import ExpertLibrary, merge
from polytask.merging.adapter import TWICE_UNTIL, open_expert, read_adapter
from polytask.merging.adapter_writer import write_adapter
from polytask.merging.config import read_config
from polytask.merging.on_disk import MergePlan, write

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **ids)
    return transformers.LlamaForCausalLM(config)


def roberta() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=20, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def gpt(kind: Any = transformers.GPT2LMHeadModel, **more: Any) -> nn.Module:
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, **more}
    model: nn.Module = kind(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, **ids))
    return model


def vit() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    )


class Plain(nn.Module):
    """PyTorch's own attention, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "llama, embedding": (llama, {"r": 2, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "roberta, ranks": (
        roberta,
        {
            "task_type": "SEQ_CLS",
            "r": 4,
            "use_rslora": True,
            "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 3},
            "alpha_pattern": {"0.attention.self.value": 3},
            "target_modules": ["query", "value", "output.dense"],
        },
    ),
    "roberta, biases": (roberta, {"r": 2, "bias": "lora_only", "target_modules": ["query", "intermediate.dense"]}),
    "roberta, all biases": (roberta, {"r": 2, "bias": "all", "lora_bias": False, "target_modules": ["key"]}),
    "roberta, bias of the update": (roberta, {"r": 2, "lora_bias": True, "target_modules": ["query"]}),
    "gpt, turned": (gpt, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama, dora": (llama, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "gpt, turned dora": (gpt, {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "convolution, dora": (Plain, {"r": 4, "use_dora": True, "target_modules": ["linear1", "conv"]}),
    "attention and convolution": (Plain, {"r": 4, "target_modules": ["self_attn", "linear1", "conv"]}),
}


def moved(model: nn.Module, seed: int) -> None:
    """Every trainable parameter away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=g)


def stored(case: str, folder: Path, experts: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A base and adapters in ``folder``, and the first expert as peft merges it."""
    make, settings = CASES[case]
    torch.manual_seed(0)
    base = make().to(dtype)
    expected: dict[str, Tensor] = {}
    state = {n: v.clone() for n, v in base.state_dict().items()}
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(folder / "base")
    else:
        (folder / "base").mkdir(parents=True)
        save_file(state, folder / "base" / "model.safetensors")
    for t in range(experts):
        torch.manual_seed(0)
        fresh = make()
        fresh.load_state_dict(state)
        model = peft.get_peft_model(fresh.to(dtype), peft.LoraConfig(**settings))
        moved(model, t)
        model.save_pretrained(folder / f"adapter{t}")
        expected = expected or {n: v.clone() for n, v in model.merge_and_unload().state_dict().items()}
    return expected


def test_attention_of_an_unknown_peft_is_refused(tmp_path: Path) -> None:
    stored("attention and convolution", tmp_path)
    setting("peft_version", "99.0")(tmp_path)
    with pytest.raises(InputError, match=r"is of peft 99\.0, and whether that adds an attention's out_proj once or"):
        read_adapter(tmp_path / "adapter0")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_the_model_that_peft_makes_of_it(case: str, tmp_path: Path) -> None:
    expected = stored(case, tmp_path)
    if "attention" in case and Version(peft.__version__) > Version(TWICE_UNTIL):
        pytest.skip("such an adapter is refused, see above")
    base = open_expert(tmp_path / "base", None)
    found = open_expert(tmp_path / "adapter0", base)
    assert set(found.specs) == set(base.specs) <= set(expected)
    changed = 0
    for name, spec in found.specs.items():
        value = found.read(name, torch.float64)
        assert tuple(value.shape) == spec.shape
        assert torch.allclose(value, expected[name].double(), rtol=1e-6, atol=1e-6), name
        changed += not torch.allclose(value, base.read(name, torch.float64), rtol=1e-3, atol=1e-3)
    assert changed >= 2


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "tsv_m", "average"])
def test_adapters_merge_as_the_models_do(method: str, tmp_path: Path) -> None:
    stored("roberta, ranks", tmp_path, experts=3)
    base = open_expert(tmp_path / "base", None)
    paths = [tmp_path / f"adapter{t}" for t in range(3)]
    whole = [{n: m.read(n) for n in m.specs} for m in (base, *(open_expert(p, base) for p in paths))]
    expected = merge(whole[0], whole[1:], method)
    write(MergePlan(paths, tmp_path / "base", method), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    again = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(
        again.state_dict()["roberta.encoder.layer.0.attention.self.query.weight"],
        expected["roberta.encoder.layer.0.attention.self.query.weight"],
    )


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    stored("llama", tmp_path, dtype=torch.bfloat16)
    base = open_expert(tmp_path / "base", None)
    found, name = open_expert(tmp_path / "adapter0", base), "model.layers.0.self_attn.q_proj.weight"
    A, B = read_adapter(tmp_path / "adapter0").pair("model.layers.0.self_attn.q_proj")
    exact = base.read(name).float() + B @ A
    assert found.specs[name].dtype == "bfloat16"
    assert torch.equal(found.read(name), exact.bfloat16())
    assert torch.allclose(found.read(name, torch.float32), exact, rtol=1e-6)


def test_the_command_line_and_mergekit_s_plus(tmp_path: Path) -> None:
    stored("llama", tmp_path, experts=2)
    arguments = [str(tmp_path / n) for n in ("base", "adapter0", "adapter1")]
    command = [sys.executable, "-m", "polytask", "merge", *arguments, "--method", "ties", "--set", "density=0.5"]
    done = subprocess.run([*command, "--out", str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ties of 2 models")
    asked = ["--as-adapter", "2", "--json", "--out", str(tmp_path / "small")]
    told = json.loads(subprocess.run([*command, *asked], capture_output=True, text=True, check=True).stdout)
    assert told["folder"] == str(tmp_path / "small")
    assert 0 < told["lost"] < 1
    assert set(read_adapter(tmp_path / "small").updates) == set(read_adapter(tmp_path / "adapter0").updates)
    models = "".join(f"  - model: ./base+./adapter{t}\n" for t in range(2))
    parameters = "parameters: {density: 0.5, normalize: true}\n"
    (tmp_path / "c.yml").write_text(f"models:\n{models}merge_method: ties\nbase_model: ./base\n{parameters}")
    write(read_config(tmp_path / "c.yml"), tmp_path / "b")
    a, b = (load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)
    base = load_file(tmp_path / "base" / "model.safetensors")
    differing = {n.rpartition(".")[0].rpartition(".")[2] for n in a if not torch.equal(a[n], base[n])}
    assert differing == {"q_proj", "k_proj", "down_proj"}


def test_an_adapter_trained_with_a_task_head_fits_the_model_without(tmp_path: Path) -> None:
    stored("roberta, ranks", tmp_path)
    whole = load_file(tmp_path / "base" / "model.safetensors")
    body = {n.removeprefix("roberta."): v for n, v in whole.items() if n.startswith("roberta.")}
    (tmp_path / "body").mkdir()
    save_file(body, tmp_path / "body" / "model.safetensors")
    base = open_expert(tmp_path / "base", None)
    one, two = (
        open_expert(tmp_path / "adapter0", base),
        open_expert(tmp_path / "adapter0", open_expert(tmp_path / "body", None)),
    )
    assert all(torch.equal(two.read(n), one.read(f"roberta.{n}")) for n in body)
    with pytest.raises(InputError, match="has no tensor classifier"):
        write(MergePlan([tmp_path / "adapter0"], tmp_path / "body"), tmp_path / "out")
    write(MergePlan([tmp_path / "adapter0"], tmp_path / "body", skip=["classifier.*"]), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(body)


def setting(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter0" / "adapter_config.json"
        said = json.loads(file.read_text())
        said[name] = value
        file.write_text(json.dumps(said))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter0" / "adapter_model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)

    return apply


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def renamed(state: dict[str, Tensor]) -> None:
    state[FIRST.replace("q_proj", "qkv")] = state.pop(FIRST)
    second = FIRST.replace("lora_A", "lora_B")
    state[second.replace("q_proj", "qkv")] = state.pop(second)


def another_base(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "other")
    file = folder / "other" / "model.safetensors"
    state = load_file(file)
    save_file({n: v + 1 for n, v in state.items()}, file)
    setting("base_model_name_or_path", str(folder / "other"))(folder)


def cut(folder: Path) -> None:
    file = folder / "adapter0" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "kind": (setting("peft_type", "LOHA"), InputError, "an adapter of the kind LOHA: only LORA"),
    "dora": (setting("use_dora", True), InputError, "has a DoRA of .* that cannot be read: let peft merge it first"),
    "tokens": (
        setting("trainable_token_indices", [1]),
        InputError,
        "sets trainable_token_indices: such an adapter is more",
    ),
    "start": (setting("init_lora_weights", "pissa"), InputError, "training began with 'pissa', which changes the base"),
    "name": (
        tensors(renamed),
        InputError,
        r"changes model.layers.0.self_attn.qkv, which .*base has not: it is for another",
    ),
    "shape": (
        tensors(lambda s: s.update({FIRST: torch.zeros(4, 12)})),
        InputError,
        r"changes model.layers.0.self_attn.q_proj.weight as a tensor of shape \[16, 12\], and .* has \[16, 16\]",
    ),
    "half": (tensors(lambda s: s.pop(FIRST)), InputError, "only one half of the update of"),
    "ranks": (tensors(lambda s: s.update({FIRST: torch.zeros(5, 16)})), InputError, "do not fit: ranks 5 and"),
    "empty": (tensors(dict.clear), InputError, "holds no LoRA"),
    "another base": (another_base, InputError, r"adapter0 is an adapter of .*other, not of .*base: their .* differ"),
    "cut": (cut, StorageError, "is cut short"),
    "gone": (
        lambda f: (f / "adapter0" / "adapter_model.safetensors").unlink(),
        StorageError,
        "there is no adapter_model",
    ),
    "json": (
        lambda f: (f / "adapter0" / "adapter_config.json").write_text("no"),
        InputError,
        "it is no JSON object",
    ),
    "nan": (
        tensors(lambda s: s[FIRST].fill_(float("nan"))),
        InputError,
        r"q_proj.weight of .*adapter0 holds NaN",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_and_nothing_written(case: str, tmp_path: Path) -> None:
    stored("llama", tmp_path)
    change, kind, message = WRONG[case]
    change(tmp_path)
    with pytest.raises(kind, match=message):
        write(MergePlan([tmp_path / "adapter0"], tmp_path / "base"), tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_an_adapter_needs_a_base(tmp_path: Path) -> None:
    stored("llama", tmp_path)
    with pytest.raises(InputError, match="holds an adapter: name the base"):
        MergePlan([tmp_path / "adapter0"], None, "average")
    with pytest.raises(InputError, match=r"holds an adapter: name the base"):
        MergePlan([tmp_path / "base"], tmp_path / "adapter0", "ties")
    with pytest.raises(InputError, match=r"is no adapter: a \+ stands between"):
        open_expert(Path(f"{tmp_path / 'base'}+{tmp_path / 'base'}"), None)
    alone = MergePlan([Path(f"{tmp_path / 'base'}+{tmp_path / 'adapter0'}")], None, "average")
    write(alone, tmp_path / "out")
    found, base = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    A, B = read_adapter(tmp_path / "adapter0").pair("model.layers.1.self_attn.q_proj")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(found[name], base[name] + B @ A, rtol=1e-6, atol=1e-6)


# --- and back


def update(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each layer."""
    adapter = read_adapter(folder)
    return {layer: torch.mm(*reversed(adapter.pair(layer, torch.float64))) for layer in adapter.updates}


@pytest.mark.parametrize("case", ["llama", "roberta, ranks", "gpt, turned"])
@pytest.mark.filterwarnings("ignore")
def test_a_sum_of_adapters_is_an_adapter(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    CASES["plain"] = (make, {n: v for n, v in settings.items() if n != "task_type"})
    stored("plain", tmp_path, experts=2)
    plan = MergePlan(
        [tmp_path / "adapter0", tmp_path / "adapter1"],
        tmp_path / "base",
        "task_arithmetic",
        lambda _: {"weights": [0.7, -0.4], "scale": 1.0},
    )
    assert write_adapter(plan, tmp_path / "merged").share < 1e-10
    one, two, found = (update(tmp_path / n) for n in ("adapter0", "adapter1", "merged"))
    for layer, D in found.items():
        assert torch.allclose(D, 0.7 * one[layer] - 0.4 * two[layer], atol=1e-6)
    fresh = make()
    fresh.load_state_dict(load_base(tmp_path / "base"), strict=False)
    model = peft.PeftModel.from_pretrained(fresh, tmp_path / "merged").merge_and_unload()
    base, again = open_expert(tmp_path / "base", None), model.state_dict()
    whole = open_expert(tmp_path / "merged", base)
    assert all(torch.allclose(whole.read(n), again[n], atol=1e-6) for n in whole.specs)


def load_base(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_smaller_rank_keeps_the_most(tmp_path: Path) -> None:
    stored("llama", tmp_path, experts=2)
    plan = MergePlan(
        [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "base", "ties", lambda _: {"density": 0.5}
    )
    write(plan, tmp_path / "whole")
    whole, base = load_base(tmp_path / "whole"), load_base(tmp_path / "base")
    again = MergePlan(plan.experts, plan.base, plan.method, plan.options)
    lost = write_adapter(again, tmp_path / "merged", 3).share
    D = {n: (whole[f"{n}.weight"] - base[f"{n}.weight"]).double() for n in update(tmp_path / "merged")}
    tails = {n: float(torch.linalg.svdvals(d)[3:].square().sum()) for n, d in D.items()}
    assert lost == pytest.approx(sum(tails.values()) / sum(float(d.square().sum()) for d in D.values()), rel=1e-4)
    for n, found in update(tmp_path / "merged").items():
        assert float((found - D[n]).square().sum()) == pytest.approx(tails[n], rel=1e-3)
        assert read_adapter(tmp_path / "merged").tensors.specs[f"base_model.model.{n}.lora_A.weight"].shape[0] == 3


def test_what_makes_no_adapter(tmp_path: Path) -> None:
    stored("roberta, ranks", tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter0"
    for experts, rank, message in (
        ([base], None, "whole models have no ranks to add up: say which rank the adapter gets"),
        ([base], 2, "no matrix of a linear layer changed"),
        ([adapter], None, "holds classifier.* whole: here adapters are low-rank updates alone"),
        ([adapter], 0, "the rank of an adapter is at least 1, not 0"),
    ):
        with pytest.raises(InputError, match=message):
            write_adapter(MergePlan(experts, base, "task_arithmetic"), tmp_path / "out", rank)
    with pytest.raises(InputError, match="exists already"):
        write_adapter(MergePlan([adapter], base, "task_arithmetic"), adapter)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_rows_of_other_lengths_are_no_low_rank_update(tmp_path: Path) -> None:
    stored("llama, dora", tmp_path)
    with pytest.raises(InputError, match=r"is a DoRA of .*: here adapters are low-rank updates alone"):
        write_adapter(MergePlan([tmp_path / "adapter0"], tmp_path / "base", "task_arithmetic"), tmp_path / "out")
    with pytest.raises(InputError, match="is a DoRA of"):
        ExpertLibrary.from_adapters(llama(), {"one": tmp_path / "adapter0"})


# --- of whole models


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "roberta": roberta,
    "gpt": gpt,
    "vit": vit,
    "gpt, head": lambda: gpt(transformers.GPT2ForSequenceClassification, num_labels=3, pad_token_id=0),
}


def tuned(make: Callable[[], nn.Module], folder: Path, experts: int = 1, only: str = "") -> None:
    """A base and models away from it in all the parameters whose names hold a text."""
    for t in range(experts + 1):
        torch.manual_seed(0)
        model = make()
        for name, p in model.named_parameters():
            p.requires_grad_(only in name)
        if t:
            moved(model, t)
        model.save_pretrained(folder / ("base" if t == 0 else f"model{t - 1}"))


def logits(model: nn.Module) -> Tensor:
    ids, picture = torch.arange(3, 13).reshape(2, 5), torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        found: Tensor = model.eval()(
            **({"pixel_values": picture} if hasattr(model, "vit") else {"input_ids": ids})
        ).logits
    return found


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.filterwarnings("ignore")
def test_peft_makes_the_merged_model_of_its_adapter(case: str, tmp_path: Path) -> None:
    tuned(WHOLE[case], tmp_path, experts=2)
    models = [tmp_path / "model0", tmp_path / "model1"]
    plan = MergePlan(models, tmp_path / "base", "task_arithmetic", lambda _: {"scale": 0.4})
    loss = write_adapter(plan, tmp_path / "adapter", 16)
    write(MergePlan(models, tmp_path / "base", "task_arithmetic", plan.options), tmp_path / "merged")
    # all but the tables of embeddings
    assert loss.left_out
    assert all("emb" in n or ".wte." in n or ".wpe." in n for n in loss.left_out)
    base, merged = load_base(tmp_path / "base"), load_base(tmp_path / "merged")
    moves = {n: float((merged[n] - base[n]).square().sum()) for n in base}
    assert loss.share == pytest.approx(sum(moves[n] for n in loss.left_out) / sum(moves.values()), rel=1e-4)
    kind = type(WHOLE[case]())
    whole = kind.from_pretrained(tmp_path / "merged")
    whole.load_state_dict({n: base[n] for n in loss.left_out}, strict=False)
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(adapted), logits(whole), atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted), logits(whole), atol=1e-2)
    assert torch.allclose(logits(adapted.merge_and_unload()), logits(whole), atol=1e-5)
    # and so do we, also where transformers calls the layers of a ViT otherwise than its file does
    again = open_expert(tmp_path / "adapter", open_expert(tmp_path / "base", None))
    changed = {n: v for n, v in merged.items() if n not in loss.left_out}
    assert all(torch.allclose(again.read(n), v, atol=1e-5) for n, v in changed.items())


def test_whole_models_lose_the_tails_of_their_spectra(tmp_path: Path) -> None:
    tuned(llama, tmp_path, only="proj")
    base, model = load_base(tmp_path / "base"), load_base(tmp_path / "model0")
    loss = write_adapter(
        MergePlan([tmp_path / "model0"], tmp_path / "base", "task_arithmetic", lambda _: {"scale": 1.0}),
        tmp_path / "adapter",
        5,
    )
    D = {n: (model[n] - base[n]).double() for n in base if "proj" in n}
    tails = sum(float(torch.linalg.svdvals(d)[5:].square().sum()) for d in D.values())
    assert loss.share == pytest.approx(tails / sum(float(d.square().sum()) for d in D.values()), rel=1e-4)
    assert loss.left_out == ()
    found = update(tmp_path / "adapter")
    assert {f"{n}.weight" for n in found} == set(D)
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["r"], said["bias"], said["modules_to_save"]) == (5, "none", None)
    assert said["base_model_name_or_path"] == str(tmp_path / "base")


def test_only_what_changed_is_in_the_adapter(tmp_path: Path) -> None:
    tuned(roberta, tmp_path, only="layer.1.output")
    plan = MergePlan([tmp_path / "model0"], tmp_path / "base", "average")
    assert write_adapter(plan, tmp_path / "adapter", 16) == (pytest.approx(0, abs=1e-9), ())
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    module = "roberta.encoder.layer.1.output"
    assert said["target_modules"] == [f"{module}.dense"]
    assert said["modules_to_save"] == [f"{module}.LayerNorm"]
    assert set(read_adapter(tmp_path / "adapter").replaced) == {
        f"{module}.dense.bias",
        f"{module}.LayerNorm.weight",
        f"{module}.LayerNorm.bias",
    }


@pytest.mark.filterwarnings("ignore")
def test_models_of_one_s_own(tmp_path: Path) -> None:
    """Without a configuration names and shapes tell what is a linear layer."""
    states = []
    for t in range(2):
        torch.manual_seed(0)
        model = Plain()
        if t:
            moved(model, t)
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        save_file(states[-1], tmp_path / f"{t}.safetensors")
    plan = MergePlan(
        [tmp_path / "1.safetensors"], tmp_path / "0.safetensors", "task_arithmetic", lambda _: {"scale": 1.0}
    )
    loss = write_adapter(plan, tmp_path / "adapter", 16)
    attention = {f"layer.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
    assert set(loss.left_out) == attention | {"conv.weight", "conv.bias"}
    fresh = Plain()
    fresh.load_state_dict(states[0])
    found = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    for n, v in found.items():
        assert torch.allclose(v, states[n not in loss.left_out][n], atol=1e-5), n


def test_the_command_line_says_what_an_adapter_leaves_out(tmp_path: Path) -> None:
    tuned(llama, tmp_path)
    command = [sys.executable, "-m", "polytask", "merge", str(tmp_path / "base"), str(tmp_path / "model0")]
    done = subprocess.run(
        [*command, "--as-adapter", "4", "--out", str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(f"task_arithmetic of 1 model: {tmp_path / 'a'}, ")
    assert first.endswith("% of the squared update lost")
    assert second == "Changed, but with no place in an adapter: model.embed_tokens.weight."
    refused = subprocess.run(
        [*command, "--as-adapter", "0", "--out", str(tmp_path / "b")], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "whole models have no ranks to add up" in refused.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_run_as_the_model_that_it_makes(tmp_path: Path) -> None:
    """Of a ViT, whose layers transformers calls otherwise than its file does."""
    torch.manual_seed(0)
    vit().save_pretrained(tmp_path / "base")
    for t in range(2):
        fresh = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
        model = peft.get_peft_model(fresh, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        moved(model, t)
        model.save_pretrained(tmp_path / f"adapter{t}")
        model.merge_and_unload().save_pretrained(tmp_path / f"whole{t}")
    save_file({"pixel_values": torch.randn(12, 3, 16, 16)}, tmp_path / "seen.safetensors")
    for method in ("regmean", "esm"):
        found = []
        for kind in ("adapter", "whole"):
            paths = [tmp_path / "base", *(tmp_path / f"{kind}{t}" for t in range(2))]
            options = ("--method", method, "--proxy", tmp_path / "seen.safetensors", "--out", tmp_path / kind / method)
            done = CliRunner().invoke(app, ["merge", *map(str, (*paths, *options))])
            assert done.exit_code == 0, done.output
            found.append(load_file(tmp_path / kind / method / "model.safetensors"))
        assert all(torch.allclose(v, found[1][n], rtol=1e-4, atol=1e-5) for n, v in found[0].items())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_replaces_another_when_told(tmp_path: Path) -> None:
    stored("llama", tmp_path, experts=2)
    paths = [str(tmp_path / n) for n in ("base", "adapter0", "adapter1")]
    command = ["merge", *paths, "--as-adapter", "2", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 0
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "exists already" in refused.stderr) == (2, True)
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0

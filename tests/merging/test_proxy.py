"""Statistics of models on disk: where inputs come from, what runs them, and that nothing is gathered twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from polytask.cli import app
from polytask.errors import InputError, PolytaskError
from polytask.merging import adapt, gather_fisher, gather_gramians, merge, on_disk
from polytask.merging.on_disk import MergePlan, plan_of, write
from polytask.merging.proxy import FEWEST, Proxy, _texts
from polytask.merging.stored import TensorFolder

FACTORY = """
from pathlib import Path
import torch

def net():
    Path(__file__).with_suffix(".log").open("a").write("made\\n")
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))

def other():
    return torch.nn.Linear(2, 2)

number = 3


def raises():
    raise ValueError("no such width")
"""


def build(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def inputs(seed: int, rows: int = 40) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, two experts, inputs for each, and a file that makes the model."""
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("base", "cars", "digits")):
        (tmp_path / name).mkdir()
        save_file(build(i).state_dict(), tmp_path / name / "model.safetensors")
        if i:
            save_file({"inputs": inputs(i), "labels": torch.zeros(40)}, tmp_path / "data" / f"{name}.safetensors")
    return tmp_path


def plan(place: Path, method: str = "regmean", data: str = "data", model: str = "net.py:net") -> MergePlan:
    named = f"{place}/{model}"
    return MergePlan([place / "cars", place / "digits"], place / "base", method, proxy=Proxy(place / data, named))


def in_memory(method: str, seeds: tuple[int, int] = (1, 2)) -> dict[str, Tensor]:
    gather = gather_fisher if method == "fisher" else gather_gramians
    seen = [gather(build(i), [inputs(s)]) for i, s in zip((1, 2), seeds, strict=True)]
    return merge(build(0).state_dict(), [build(i).state_dict() for i in (1, 2)], method, statistics=seen)


def same(folder: Path, expected: dict[str, Tensor]) -> bool:
    found = load_file(folder / "model.safetensors")
    return all(torch.allclose(found[n], t, rtol=1e-4, atol=1e-6) for n, t in expected.items())


@pytest.mark.parametrize("method", ["regmean", "fisher", "esm"])
def test_the_same_as_in_memory(place: Path, method: str) -> None:
    told: list[str] = []
    write(plan(place, method), place / "out", told=told.append)
    assert same(place / "out", in_memory(method))
    assert told[:2] == ["statistics of cars", "statistics of digits"]
    assert sorted(p.name for p in (place / "out").iterdir()) == ["merge.json", "model.safetensors"]
    assert json.loads((place / "out/merge.json").read_text())["proxy"]["data"] == str(place / "data")
    assert not [p for p in place.glob(".*") if p.is_dir()]


@pytest.mark.parametrize("method", ["esm", "regmean"])
def test_started_again_it_gathers_nothing_again(place: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(on_disk, "_write_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(plan(place, method), place / "out")
    assert not (place / "out").exists()
    assert (place / "net.log").read_text().count("made") == 2
    kept = TensorFolder(place / ".out.merging/kept")
    assert set(kept) == ({"0.weight", "2.weight"} if method == "esm" else set())
    assert all(name in kept and torch.isfinite(kept[name]).all() for name in kept)
    write(plan(place, method), place / "out")
    assert (place / "net.log").read_text().count("made") == 2
    assert same(place / "out", in_memory(method))


def test_one_file_serves_all_and_files_in_order_serve_each(place: Path) -> None:
    np.savez(place / "all.npz", inputs=inputs(5).numpy())
    write(plan(place, data="all.npz"), place / "out")
    assert same(place / "out", in_memory("regmean", (5, 5)))
    for old, new in (("cars", "1"), ("digits", "2")):
        (place / f"data/{old}.safetensors").rename(place / f"data/{new}.safetensors")
    write(plan(place), place / "again")
    assert same(place / "again", in_memory("regmean"))


def polytask(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command(place: Path) -> None:
    models = [place / n for n in ("base", "cars", "digits")]
    done = polytask(
        *("merge", *models, "--method", "esm", "--set", "scale=0.5", "--proxy", place / "data"),
        *("--model", f"{place}/net.py:net", "--out", place / "out"),
    )
    assert done.exit_code == 0, done.output
    found, expected = load_file(place / "out/model.safetensors"), in_memory("esm")
    base = load_file(place / "base/model.safetensors")
    assert torch.allclose(
        found["0.weight"] - base["0.weight"], (expected["0.weight"] - base["0.weight"]) / 2, atol=1e-5
    )


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        ("nothing", "net.py:net", "there are no proxy inputs at"),
        ("few.npz", "net.py:net", f"holds 3 proxy inputs: {FEWEST} are the least"),
        ("wrong.npz", "net.py:net", "cannot run the inputs of .*wrong.npz"),
        ("named.npz", "net.py:net", "cannot run the inputs of .*unexpected keyword argument 'pixels'"),
        ("ragged.npz", "net.py:net", "different lengths: a 9, b 8"),
        ("objects.npz", "net.py:net", "objects.npz holds pickled objects"),
        ("broken.npz", "net.py:net", "cut short or not a file of arrays"),
        ("notes.txt", "net.py:net", "holds no proxy inputs: they come as"),
        ("table.csv", "net.py:net", "has no column 'text'; it has a, b"),
        ("text.csv", "net.py:net", "has no tokenizer"),
        ("lonely", "net.py:net", "holds no proxy inputs called cars, but birds"),
        ("data", "net.py:number", "gives no model: 'int' object is not callable"),
        ("data", "net.py:absent", "gives no model: module 'net' has no attribute 'absent'"),
        ("data", "missing.py:net", "gives no model: there is no file"),
        ("data", "net.py:raises", "gives no model: no such width"),
        ("data", "net.py", "named by MODULE:FACTORY"),
        ("data", "net.py:other", r"has a tensor weight of shape \[2, 2\], which .*cars has not"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, data: str, model: str, said: str) -> None:
    np.savez(place / "few.npz", inputs=np.zeros((3, 6), np.float32))
    np.savez(place / "wrong.npz", inputs=np.zeros((9, 5), np.float32))
    np.savez(place / "named.npz", pixels=np.zeros((9, 6), np.float32))
    np.savez(place / "ragged.npz", a=np.zeros((9, 6)), b=np.zeros((8, 6)))
    np.savez(place / "objects.npz", inputs=np.array([{}] * 9, dtype=object))
    (place / "broken.npz").write_bytes(b"PK\3\4 broken")
    (place / "notes.txt").write_text("nothing")
    (place / "table.csv").write_text("a,b\n1,2\n3,4\n")
    (place / "text.csv").write_text("text,b\nsome words,2\nmore words,4\n")
    (place / "lonely").mkdir()
    np.savez(place / "lonely/birds.npz", inputs=inputs(0).numpy())
    with pytest.raises(PolytaskError, match=said) as caught:
        write(plan(place, data=data, model=model), place / "out")
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()
    assert not (place / ".out.merging").exists()


def test_statistics_asked_for_and_not() -> None:
    base, experts = build(0).state_dict(), [build(i).state_dict() for i in (1, 2)]
    seen = [gather_gramians(nn.Sequential(nn.Sequential(build(0))), [inputs(1)]) for _ in range(2)]
    with pytest.raises(
        InputError, match=r"the statistics are of 0\.0\.0\.weight, .*: of no tensor that is merged, such as 0\.weight"
    ):
        merge(base, experts, "regmean", statistics=seen)
    with pytest.raises(InputError, match="esm merges task vectors: it needs the base"):
        merge(None, experts, "esm", statistics=seen)


def test_proxy_inputs_and_methods_that_have_no_use_for_them_or_lack_them(place: Path) -> None:
    with pytest.raises(InputError, match="ties looks at no data"):
        plan(place, "ties")
    with pytest.raises(InputError, match="regmean looks at data: name a few dozen inputs of each expert"):
        MergePlan([place / "cars"], None, "regmean")
    assert polytask("merge", place / "base", place / "cars", "--model", "a:b").exit_code == 2


def test_transformers_folders_and_tables_of_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["the", "cat", "dog", "sat", "ran", "far"]]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    models = []
    for i, name in enumerate(("base", "one", "two")):
        torch.manual_seed(i)
        models.append(transformers.BertForSequenceClassification(config).eval())
        models[-1].save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = ["the cat sat", "the dog", "far", "the cat ran far the dog ran", *["dog"] * 5]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    experts = [tmp_path / "one", tmp_path / "two"]
    write(MergePlan(experts, tmp_path / "base", "regmean", proxy=Proxy(tmp_path / "texts.jsonl")), tmp_path / "out")
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    seen = [gather_gramians(m, [batch]) for m in models[1:]]
    expected = merge(models[0].state_dict(), [m.state_dict() for m in models[1:]], "regmean", statistics=seen)
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    for n, t in merged.state_dict().items():
        assert torch.allclose(t, expected[n], rtol=1e-3, atol=1e-5), n
    assert int(seen[0]["bert.encoder.layer.0.attention.self.query.weight"][-1, -1]) == int(
        batch["attention_mask"].sum()
    )


LEARNING: list[tuple[str, dict[str, Any]]] = [
    ("adamerging", {"steps": 5, "learning_rate": 0.1}),
    ("adarank", {"steps": 3}),
    ("frank_wolfe", {"labels": True, "start": 0.0}),
    ("regmean_pp", {}),
]


def learned(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    batches: dict[str, list[Any]] = {}
    for i, expert in enumerate(("cars", "digits"), 1):
        parts = inputs(i).split(16)
        batches[expert] = (
            [(x, torch.zeros(len(x), dtype=torch.long)) for x in parts] if "labels" in options else [*parts]
        )
    states = {e: build(i).state_dict() for i, e in enumerate(batches, 1)}
    return adapt(build(0), build(0).state_dict(), states, batches, name, check=False, **options)


@pytest.mark.filterwarnings("ignore:.*led away")
@pytest.mark.parametrize(("name", "options"), LEARNING)
def test_methods_that_run_the_model_do_so_on_disk(place: Path, name: str, options: dict[str, Any]) -> None:
    settings = [t for o, v in options.items() for t in ("--set", f"{o}={str(v).lower()}")]
    command = (
        "merge",
        place / "base",
        place / "cars",
        place / "digits",
        "--method",
        name,
        *settings,
        "--proxy",
        place / "data",
    )
    command = (*command, "--model", f"{place}/net.py:net")
    planned = polytask(*command, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["peak_bytes"] > 5 * json.loads(planned.stdout)["bytes"]
    assert not (place / "net.log").exists()
    done = polytask(*command, "--out", place / "out")
    assert done.exit_code == 0, done.stderr
    assert same(place / "out", learned(name, options))
    assert sorted(p.name for p in (place / "out").iterdir()) == ["merge.json", "model.safetensors"]


@pytest.mark.filterwarnings("ignore:.*led away")
def test_killed_and_started_again_it_learns_nothing_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def planned() -> MergePlan:
        return plan_of("adamerging")(
            [place / "cars", place / "digits"],
            place / "base",
            "adamerging",
            lambda _: {"steps": 3},
            proxy=Proxy(place / "data", f"{place}/net.py:net"),
        )

    with monkeypatch.context() as patched:
        patched.setattr(on_disk, "_write_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(planned(), place / "out")
    assert not (place / "out").exists()
    assert (place / "net.log").read_text().count("made") == 1
    write(planned(), place / "out")
    assert (place / "net.log").read_text().count("made") == 1
    assert same(place / "out", learned("adamerging", {"steps": 3}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--no-base",), "adamerging merges task vectors: it needs the base"),
        (("--set", "colour=3"), "adamerging has no option 'colour'"),
        (
            ("--set", "labels=true", "--proxy", "bare.npz"),
            "bare.npz holds no array 'labels', which the method learns from",
        ),
        (("--proxy", "nowhere"), "there are no proxy inputs at"),
        (("--set", "labels=true", "--proxy", "half.npz"), "the labels in half.npz are one whole number an example"),
        (("--set", "labels=true", "--proxy", "far.npz"), "adamerging cannot run the model on far.npz, or its answers"),
        (("--proxy", "wide.npz"), "adamerging cannot run the model on wide.npz, or its answers"),
        (("--as-adapter", "2"), "adamerging looks at data with whole models"),
    ],
)
def test_bad_input_of_methods_that_run_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    monkeypatch.chdir(place)
    np.savez("bare.npz", inputs=inputs(1).numpy())
    np.savez("half.npz", inputs=inputs(1).numpy(), labels=np.full(40, 1.5))
    np.savez("far.npz", inputs=inputs(1).numpy(), labels=np.full(40, 9))
    np.savez("wide.npz", inputs=np.ones((40, 7), dtype="f4"))
    done = polytask(
        "merge",
        "base",
        "cars",
        "digits",
        "--method",
        "adamerging",
        "--proxy",
        "data",
        "--model",
        "net.py:net",
        "--out",
        "out",
        *change,
    )
    assert (done.exit_code in (2, 5), said in done.stderr) == (True, True), done.stderr
    assert not [p for p in place.iterdir() if "out" in p.name]


def test_a_table_may_hold_labels(tmp_path: Path) -> None:
    file = tmp_path / "cars.csv"
    file.write_text("text,labels\nfast,1\n,0\nslow,2\n")
    texts, labels = _texts(file)
    assert texts == ["fast", "slow"]
    assert labels["labels"].tolist() == [1, 2]
    file.write_text("text,labels\nfast,good\n")
    assert _texts(file) == (["fast"], {})

"""Models on disk: formats, configurations, memory, interruption, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from polytask.cli import app
from polytask.errors import InputError, StorageError
from polytask.merging import make_filter, merge
from polytask.merging.checkpoint import open_checkpoint
from polytask.merging.config import depth_of, evaluate, read_config
from polytask.merging.on_disk import MergePlan, write
from polytask.merging.safetensors_file import Writer

from .conftest import State, family


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, list[Path], State, list[State]]:
    """A base and three experts as safetensors files: paths and states."""
    base, experts = family(3, dtype=torch.float32)
    paths = [tmp_path / f"{n}.safetensors" for n in ("base", "one", "two", "three")]
    for path, state in zip(paths, (base, *experts), strict=True):
        save_file(state, path)
    return paths[0], paths[1:], base, experts


def read(folder: Path) -> State:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def polytask(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


Stored = tuple[Path, list[Path], State, list[State]]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsv_m", "average", "karcher"])
@pytest.mark.parametrize("shard_size", [1 << 30, 3000])
def test_the_same_as_in_memory(stored: Stored, tmp_path: Path, method: str, shard_size: int) -> None:
    base_path, paths, base, experts = stored
    seen: list[str] = []
    write(MergePlan(paths, base_path, method, seed=3, shard_size=shard_size), tmp_path / "out", progress=seen.append)
    assert same(read(tmp_path / "out"), merge(base, experts, method, seed=3))
    assert sorted(seen) == sorted(base)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    if shard_size > 3000:
        assert files == ["merge.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in base.values())
        assert {n: (n in load_file(tmp_path / "out" / f)) for n, f in index["weight_map"].items()} == dict.fromkeys(
            base, True
        )
    assert not list(tmp_path.glob(".*"))


def test_every_format_is_one_model(stored: Stored, tmp_path: Path) -> None:
    base_path, _, base, _ = stored
    torch.save(base, tmp_path / "plain.pt")
    torch.save({"state_dict": base, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(base, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    write(MergePlan([base_path], None, "average", shard_size=2000), tmp_path / "sharded")
    (tmp_path / "folder").mkdir()
    torch.save(base, tmp_path / "folder/pytorch_model.bin")
    for name in ("base.safetensors", "plain.pt", "wrapped.pth", "old.bin", "sharded", "folder"):
        opened = open_checkpoint(tmp_path / name)
        assert same({n: opened.read(n) for n in opened.specs}, base), name
    assert opened.bytes == sum(t.nbytes for t in base.values())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.bool, torch.int16]
)
def test_dtypes_survive_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "a": (4 * torch.randn(5, 3)).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "number": torch.ones((), dtype=dtype),
    }
    save_file(state, tmp_path / "theirs.safetensors")
    opened = open_checkpoint(tmp_path / "theirs.safetensors")
    with Writer(tmp_path / "ours.safetensors", opened.specs) as writer:
        for name in opened.specs:
            writer.add(name, opened.read(name))
    found = load_file(tmp_path / "ours.safetensors")
    assert all(found[n].dtype == t.dtype and torch.equal(found[n].double(), t.double()) for n, t in state.items())
    if dtype.is_floating_point:
        assert torch.equal(opened.read("a", torch.float32), state["a"].float())


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    specs = open_of(tmp_path, {"a": torch.ones(3)}).specs
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "new.safetensors", specs):
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["some.safetensors"]


def open_of(folder: Path, state: State):
    save_file(state, folder / "some.safetensors")
    return open_checkpoint(folder / "some.safetensors")


def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    states = []
    for t in range(3):
        torch.manual_seed(t)
        model = transformers.BertForSequenceClassification(config)
        model.save_pretrained(tmp_path / f"m{t}")
        states.append({n: v.clone() for n, v in model.state_dict().items()})
    (tmp_path / "m0/tokenizer_config.json").write_text("{}")
    (tmp_path / "m0/README.md").write_text("of the base")
    write(MergePlan([tmp_path / "m1", tmp_path / "m2"], tmp_path / "m0", "ties", dtype="bfloat16"), tmp_path / "out")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    expected = merge(states[0], states[1:], "ties", dtype="bfloat16")
    assert all(torch.equal(v, expected[n]) for n, v in loaded.state_dict().items())
    assert (tmp_path / "out/tokenizer_config.json").exists()
    assert not (tmp_path / "out/README.md").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from polytask.merging.on_disk import MergePlan, write
base, *experts = map(Path, sys.argv[2:])
def progress(name):
    if name == "last.weight":
        os.kill(os.getpid(), signal.SIGKILL)
write(MergePlan(experts, base, "dare_ties", shard_size=1500), Path(sys.argv[1]), progress=progress)
"""


def test_killed_and_started_again(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_path, paths, base, experts = stored
    out = tmp_path / "out"
    run = [sys.executable, "-c", KILLED, str(out), str(base_path), *map(str, paths)]
    done = subprocess.run(run, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    finished = json.loads((tmp_path / ".out.merging/journal.json").read_text())["finished"]
    plan = MergePlan(paths, base_path, "dare_ties", shard_size=1500)
    assert 0 < len(finished) < len(plan.files)
    loaded: list[str] = []
    load = MergePlan.load
    monkeypatch.setattr(MergePlan, "load", lambda self, name: loaded.append(name) or load(self, name))
    write(plan, out)
    already = {n for f in finished for n in plan.files[f]}
    assert set(loaded) == {n for n in plan.match.merged if n not in already}
    assert same(read(out), merge(base, experts, "dare_ties"))
    assert not (tmp_path / ".out.merging").exists()
    assert not (out / "journal.json").exists()


def test_another_merge_does_not_go_on_with_it(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, base, experts = stored
    work = tmp_path / ".out.merging"
    work.mkdir()
    (work / "journal.json").write_text(json.dumps({"plan": "of another", "finished": ["model.safetensors"]}))
    (work / "model.safetensors").write_text("of another")
    write(MergePlan(paths, base_path), tmp_path / "out")
    assert same(read(tmp_path / "out"), merge(base, experts))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_only_a_few_tensors_are_in_memory(tmp_path: Path) -> None:
    """Peak of resident memory above the idle process: T + 2 of the largest tensor, and what allocators and chunks take."""
    size, experts = 4 << 20, 4
    for t in range(experts + 1):
        save_file({f"{i}.weight": torch.randn(size // 1024, 1024) for i in range(6)}, tmp_path / f"{t}.safetensors")
    program = """
import sys
from pathlib import Path
import torch
from polytask.merging.on_disk import MergePlan, write
from polytask.merging import make_filter, merge
torch.set_num_threads(1)
small = {"w": torch.randn(300, 300)}
merge(small, [small] * 4, sys.argv[2])  # what the libraries load on first use
def resident(what):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # forget the peak of the imports
before = resident("VmRSS")
paths = [Path(sys.argv[1]) / f"{t}.safetensors" for t in range(5)]
write(MergePlan(paths[1:], paths[0], sys.argv[2]), Path(sys.argv[1]) / ("out_" + sys.argv[2]))
print(resident("VmHWM") - before)
"""
    for method in ("ties", "dare_ties"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), method], capture_output=True, text=True, check=True
        )
        # a checkpoint has six such tensors, and there are five of them
        assert (experts + 1) * 4 * size <= int(done.stdout) < (experts + 2) * 4 * size + 32e6


# --- configurations


def configured(folder: Path, text: str) -> MergePlan:
    (folder / "merge.yml").write_text(text)
    return read_config(folder / "merge.yml")


def test_a_mergekit_file(stored: Stored, tmp_path: Path) -> None:
    _, _, base, experts = stored
    plan = configured(
        tmp_path,
        """
models:
  - model: base.safetensors
  - model: one.safetensors
    parameters: {density: 0.5, weight: 0.5}
  - model: two.safetensors
    parameters:
      density: 0.3
      weight:
        - filter: last
          value: 2.0
        - value: 0.25
merge_method: ties
base_model: base.safetensors
parameters: {normalize: true, int8_mask: true, lambda: 0.8}
dtype: float16
""",
    )
    write(plan, tmp_path / "out")
    found = read(tmp_path / "out")
    for names, weights in ((("last.weight",), [0.5, 2.0]), (("first.weight", "scale"), [0.5, 0.25])):
        part = [{n: s[n] for n in names} for s in (base, *experts[:2])]
        options = {"density": [0.5, 0.3], "weights": weights, "scale": 0.8, "dtype": "float16"}
        expected = merge(part[0], part[1:], "ties", **options)
        assert all(torch.equal(found[n], expected[n]) for n in names)


def test_mergekit_s_defaults_hold_in_its_files(stored: Stored, tmp_path: Path) -> None:
    listed = "models: [{model: one.safetensors}, {model: two.safetensors}]\nbase_model: base.safetensors\n"
    assert configured(tmp_path, listed + "merge_method: ties\n").options("scale")["density"] == 1.0
    assert configured(tmp_path, listed + "merge_method: task_arithmetic\n").options("scale")["scale"] == 1.0
    della = configured(tmp_path, listed + "merge_method: della\nparameters: {epsilon: 0.1, density: 0.5}\n")
    assert della.options("scale") == {"density": 0.5, "epsilon": 0.2, "scale": 1.0}
    slerp = "slices: [{sources: [{model: base.safetensors, layer_range: [0, 0]}, {model: one.safetensors, layer_range: [0, 0]}]}]\n"
    plan = configured(tmp_path, slerp + "merge_method: slerp\nbase_model: base.safetensors\nparameters: {t: 0.25}\n")
    assert plan.options("scale") == {"t": 0.25}
    assert [p.name for p in plan.experts] == ["one.safetensors"]


def test_gradients_over_layers() -> None:
    layers = {"model.layers.": 5}
    depths = [depth_of(f"model.layers.{i}.q.weight", layers) for i in range(5)]
    assert depths == [0, 0.25, 0.5, 0.75, 1]
    assert [evaluate([0.0, 1.0, 0.0], "x", t) for t in depths] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert [evaluate([0.3], "x", t) for t in depths] == [0.3] * 5
    assert evaluate(["1e-4", "3e-4"], "x", 0.5) == pytest.approx(2e-4)
    assert evaluate(["low", "high"], "x", 0.5) == "low"
    assert depth_of("model.embed_tokens.weight", layers) == 0
    assert depth_of("lm_head.weight", layers) == 0
    cases = [{"filter": "q", "value": [0, 1]}, {"filter": "mlp", "value": 0.5}]
    assert evaluate(cases, "model.layers.4.q.weight", 1.0) == 1
    assert evaluate(cases, "model.layers.4.mlp.weight", 1.0) == 0.5
    assert evaluate(cases, "norm", 1.0) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: ties\ncolour: 3", "'colour', which is not known"),
        ("models: []", "names no merge_method"),
        ("[1, 2", "is not a YAML file"),
        ("merge_method: ties", "either models or slices"),
        (
            "merge_method: tis\nmodels: [{model: one.safetensors}]",
            "there is no merging method called 'tis'; did you mean ties",
        ),
        ("merge_method: ties\nmodels: [{model: one.safetensors}]", "ties merges task vectors: it needs the base"),
        ("merge_method: average\nmodels: [{modle: one.safetensors}]", "names no model"),
        (
            "merge_method: average\nmodels: [{model: one.safetensors, parameters: {colour: 1}}]",
            "sets 'colour', which average",
        ),
        ("merge_method: average\nmodels: [{model: ./org/model}]", "there is no model at"),
        (
            "merge_method: average\ntokenizer_source: union\nmodels: [{model: one.safetensors}]",
            "union of the tokenizers",
        ),
        ("merge_method: average\nslices: [{sources: []}, {sources: []}]", "names no model"),
        (
            "merge_method: average\nslices: [{sources: [{model: one.safetensors, layer_range: [0, 3]}]}]",
            "bad.yml takes layers [0, 3] of one.safetensors, which has 0",
        ),
        (
            "merge_method: linear\nmodels: [{model: one.safetensors, parameters: {weight: 1}}, {model: two.safetensors}]",
            "'weight' for some models only",
        ),
    ],
)
def test_bad_configurations(stored: Stored, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.yml").write_text(text)
    done = polytask("merge", tmp_path / "bad.yml", tmp_path / "out")
    assert done.exit_code in (2, 5)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- the command


def test_the_short_form(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, base, experts = stored
    options = ("--method", "ties", "--set", "density=0.4", "--set", "weights=1,2,0.5", "--out", tmp_path / "out")
    done = polytask("merge", base_path, *paths, *options)
    assert done.exit_code == 0, done.stderr
    assert same(read(tmp_path / "out"), merge(base, experts, "ties", density=0.4, weights=[1, 2, 0.5]))
    again = polytask("merge", base_path, *paths, *options)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert polytask("merge", base_path, *paths, "--overwrite", "--out", tmp_path / "out").exit_code == 0
    assert same(read(tmp_path / "out"), merge(base, experts))
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert (record["method"], record["experts"]) == ("task_arithmetic", [str(p) for p in paths])


def test_filters_and_models_without_base(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, base, experts = stored
    assert polytask("merge", base_path, *paths, "--filter", "trim", "--out", tmp_path / "a").exit_code == 0
    assert same(read(tmp_path / "a"), merge(base, experts, filters=["trim"]))
    assert polytask("merge", *paths, "--no-base", "--method", "average", "--out", tmp_path / "b").exit_code == 0
    assert same(read(tmp_path / "b"), merge(None, experts, "average"))


def test_options_follow_a_filter(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, base, experts = stored
    done = polytask("merge", base_path, *paths, "--filter", "trim:density=0.1,scope=tensor", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    expected = merge(base, experts, filters=[make_filter("trim", density=0.1)])
    assert same(read(tmp_path / "a"), expected)
    assert not same(expected, merge(base, experts, filters=["trim"]))
    for wrong, said in (("trim:densty=1", "trim has no option 'densty'"), ("trim:0.1", "trim:OPTION=VALUE")):
        refused = polytask("merge", base_path, *paths, "--filter", wrong, "--out", tmp_path / "b")
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_a_merge_of_nothing_is_refused(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, _, _ = stored
    refused = polytask("merge", base_path, *paths, "--skip", "*", "--out", tmp_path / "a")
    assert refused.exit_code == 2
    assert f"{base_path} has no tensor to merge" in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "a").exists()


def test_the_plan_reads_no_weight(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_path, paths, base, _ = stored
    monkeypatch.setattr(MergePlan, "load", None)
    done = polytask("merge", base_path, *paths, "--method", "ties", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parameters"] == sum(t.numel() for t in base.values())
    assert plan["bytes"] == sum(t.nbytes for t in base.values())
    assert plan["kept"] == ["steps"]
    # the base's tensor, three task vectors and one more
    assert plan["peak_bytes"] == 5 * max(t.nbytes for t in base.values())
    text = polytask("merge", base_path, *paths, "--dry-run")
    assert "5 tensors merged, 1 taken from the base" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 100 or len(str(base_path)) > 60
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors",
        "one.safetensors",
        "three.safetensors",
        "two.safetensors",
    ]


# --- everything that can be wrong


def change(path: Path, alter: Callable[[State], None]) -> None:
    state = load_file(path)
    alter(state)
    save_file(state, path)


def put(name: str, value: object) -> Callable[[State], None]:
    return lambda s: s.update({name: value(s[name]) if callable(value) else value})


WRONG: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing tensor": (
        lambda p: change(p, lambda s: s.pop("last.weight")),
        2,
        "two.safetensors has no tensor last.weight, which",
    ),
    "superfluous tensor": (lambda p: change(p, put("head", torch.ones(3))), 2, "has no tensor head, which"),
    "shape": (lambda p: change(p, put("last.weight", torch.ones(3, 24))), 2, "last.weight has shape [3, 24] in"),
    "dtype": (lambda p: change(p, put("last.weight", lambda t: t.half())), 2, "last.weight is float16 in"),
    "kind": (lambda p: change(p, put("last.weight", lambda t: t.int())), 2, "last.weight is int32 in"),
    "nan": (lambda p: change(p, put("last.weight", lambda t: t * float("nan"))), 2, "last.weight of"),
    "cut short": (
        lambda p: os.truncate(p, p.stat().st_size - 100),
        5,
        "two.safetensors is cut short within the tensor",
    ),
    "header cut": (lambda p: os.truncate(p, 40), 5, "two.safetensors is cut short: its header"),
    "empty": (lambda p: p.write_bytes(b""), 2, "two.safetensors is not a safetensors file"),
    "text": (lambda p: p.write_text("hello, this is no model at all"), 2, "is not a safetensors file"),
    "gone": (lambda p: p.unlink(), 5, "there is no model at"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_sentence(stored: Stored, tmp_path: Path, case: str) -> None:
    base_path, paths, _, _ = stored
    spoil, code, said = WRONG[case]
    spoil(paths[1])
    before = sorted(tmp_path.iterdir())
    done = polytask("merge", base_path, *paths, "--out", tmp_path / "out")
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
    assert "two.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


class Runs:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (pickle.dumps({"w": Runs()}), InputError, "may run code"),
        (b"\x80", StorageError, "cut short or not a file of tensors"),
        (None, InputError, "holds a list"),
    ],
)
def test_pickles_run_no_code(
    tmp_path: Path, content: bytes | None, error: type[Exception], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.pt"
    if content is None:
        torch.save([torch.ones(2)], file)
    else:
        file.write_bytes(content)
    with pytest.raises(error, match=said):
        open_checkpoint(file)
    assert "code ran" not in capsys.readouterr().out


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no safetensors file and no pytorch_model"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        open_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(StorageError, match=r"the shard .*model-00001-of-00002\.safetensors is missing"):
        open_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(InputError, match="is not an index"):
        open_checkpoint(tmp_path)


def test_heads_that_differ_are_skipped(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, base, experts = stored
    for k, path in enumerate(paths):
        change(path, put("last.weight", torch.ones(k + 2, 24)))
    write(MergePlan(paths, base_path, skip=["last.*"]), tmp_path / "out")
    expected = merge(base, experts)
    assert same(read(tmp_path / "out"), {**expected, "last.weight": base["last.weight"]})
    with pytest.raises(InputError, match="no tensor's name fits the skip pattern 'lats"):
        MergePlan(paths, base_path, skip=["last.*", "lats.*"])


def test_too_large_for_the_dtype(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, _, _ = stored
    for p in (base_path, *paths):
        change(p, put("scale", torch.tensor(1e6)))
    with pytest.raises(InputError, match="the merged tensor scale does not fit into float16"):
        write(MergePlan(paths, base_path, dtype="float16"), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_result_cannot_replace_its_source(stored: Stored, tmp_path: Path) -> None:
    base_path, paths, _, _ = stored
    with pytest.raises(InputError, match="is where a model to be merged lies"):
        write(MergePlan(paths, base_path), tmp_path, overwrite=True)

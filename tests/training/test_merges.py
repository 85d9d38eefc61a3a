"""Ways of merging judged on tasks: known accuracies, what validation may choose, what is kept when work is interrupted."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from polytask.cli import app
from polytask.errors import InputError
from polytask.merging import Merger, merge
from polytask.registry import methods
from polytask.training.data import TaskData
from polytask.training.merges import Candidate, Lineage, MergeTask, candidate, compare, merged, read_comparison
from polytask.training.merges.candidates import grid
from polytask.training.merges.compare import Settings

MERGERS = list(methods("merging"))
NAMES = ("left", "middle", "right")
T = len(NAMES)


class Net(nn.Module):
    """A linear body and a linear head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2 * T, 2 * T, bias=False), nn.Linear(2 * T, classes, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def build(_: str, state: Any) -> Net:
    net = Net(len(state["head.weight"]))
    net.load_state_dict(state)
    return net


def rows(t: int, seed: int, count: int = 40) -> TaskData:
    """Inputs within the two coordinates of task t; the label is the sign of the first."""
    x = torch.zeros(count, 2 * T)
    x[:, 2 * t : 2 * t + 2] = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return TaskData(x, {NAMES[t]: (x[:, 2 * t] > 0).long()})


def head(t: int) -> Tensor:
    w = torch.zeros(2, 2 * T)
    # expects what the expert's body has turned round
    w[0, 2 * t], w[1, 2 * t] = 1.0, -1.0
    return w


def lineage() -> Lineage:
    """Every expert turns its own two coordinates round: task vectors are orthogonal, and scales above 1/2 add up to all experts."""
    base = {"body.weight": torch.eye(2 * T), "head.weight": torch.zeros(5, 2 * T)}
    experts = {}
    for t, name in enumerate(NAMES):
        body = torch.eye(2 * T)
        body[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] *= -1
        experts[name] = {"body.weight": body, "head.weight": head(t)}
    return Lineage(base, experts, build, ("head.*",))


def tasks(noise: int = 0) -> list[MergeTask]:
    made = []
    for t, name in enumerate(NAMES):
        test = rows(t, 100 + t)
        test.targets[name][:noise] = 1 - test.targets[name][:noise]
        made.append(MergeTask(name, rows(t, t), test))
    return made


def by_name(results: dict[str, Any]) -> dict[str, Any]:
    return {c["name"]: c for c in results["candidates"]}


def test_known_accuracies(tmp_path: Path) -> None:
    found = compare(tasks(), lineage(), [merged(m, experts=T) for m in ("average", "tsv_m")], folder=tmp_path)
    rows_ = by_name(found)
    assert [c["role"] for c in found["candidates"]] == ["reference", "reference", "baseline", "method", "method"]
    assert rows_["experts"]["normalised"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    # a third of each task vector turns nothing round; the base has nothing turned round
    assert rows_["base"]["mean_accuracy"]["mean"] == rows_["average"]["mean_accuracy"]["mean"] == 0
    assert rows_["task_arithmetic"]["normalised"]["mean"] == rows_["tsv_m"]["normalised"]["mean"] == 1
    assert rows_["task_arithmetic"]["chosen"][0]["scale"] > 0.5
    assert rows_["average"]["difference"] == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert found["verdict"]["method"] in ("task_arithmetic", "tsv_m")
    assert "average" not in found["verdict"]["alike"]
    assert "Against the base with the experts' heads: +100.0 points" in found["verdict"]["text"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    seen = found["interference"]
    assert np.allclose(seen["cosine"], np.eye(T))
    assert np.allclose(seen["norm"], np.sqrt(8))


def test_a_merge_that_is_no_better_than_its_base_is_called_that(tmp_path: Path) -> None:
    line = lineage()
    line.base["body.weight"][:] = -torch.eye(2 * T)  # right about every task
    said = compare(tasks(), line, [merged("average", experts=T)], folder=tmp_path)["verdict"]
    assert said["over_base"]["mean"] == 0
    assert "It cannot be told from the base" in said["text"]


def test_test_rows_choose_nothing(tmp_path: Path) -> None:
    options = dict(folder=tmp_path / "a"), dict(folder=tmp_path / "b")
    first, second = (
        compare(tasks(noise), lineage(), [merged("ties", experts=T)], **o)
        for noise, o in zip((0, 25), options, strict=True)
    )
    for a, b in zip(first["candidates"], second["candidates"], strict=True):
        assert (a["chosen"], a["validation_score"]) == (b["chosen"], b["validation_score"])
    assert by_name(first)["ties"]["accuracy"] != by_name(second)["ties"]["accuracy"]


def test_intervals_are_paired(tmp_path: Path) -> None:
    """The same predictions differ by nothing at all, although each accuracy is uncertain."""
    twin = Candidate("twin", lambda line: line.base)
    found = by_name(compare(tasks(noise=10), lineage(), [twin], folder=tmp_path))
    assert found["twin"]["accuracy"] == found["base"]["accuracy"]
    assert found["twin"]["difference"] == found["base"]["difference"]
    spread = found["base"]["accuracy"]["left"]
    assert spread["low"] < spread["mean"] == 0.25 < spread["high"]


@pytest.mark.parametrize("how", ["states", "modules", "one module", "one state"])
def test_candidates_of_every_form(tmp_path: Path, how: str) -> None:
    def make(line: Lineage, strength: float) -> Any:
        body = torch.eye(2 * T) * (1 - 2 * strength)
        per_task = {n: {"body.weight": body} for n in NAMES}
        whole = Net(2)
        whole.load_state_dict({"body.weight": body, "head.weight": head(0) + head(1) + head(2)})
        return {
            "states": per_task,
            "modules": {n: build(n, s | {"head.weight": line.experts[n]["head.weight"]}) for n, s in per_task.items()},
            "one module": whole,
            "one state": per_task["left"],
        }[how]

    mine = Candidate("mine", make, {"strength": (0.1, 0.9)})
    found = by_name(compare(tasks(), lineage(), [mine], folder=tmp_path))["mine"]
    assert found["normalised"]["mean"] == 1
    assert found["chosen"] == [{"strength": 0.9}]
    assert found["trials"] == 2


def test_systems_join(tmp_path: Path) -> None:
    """Packed masks give orthogonal experts back; routed experts add what the merged model lacks of each."""
    asked = [candidate(n, experts=T) for n in ("emr", "tall", "esm_pp", "smile", "bitdelta", "randes")]
    asked.append(candidate("adamerging", experts=T, options={"steps": 3, "start": [0.3, 0.8]}))
    found = by_name(compare(tasks(), lineage(), asked, folder=tmp_path))
    assert {n: found[n]["role"] for n in ("emr", "bitdelta", "randes", "esm_pp", "smile", "adamerging")} == {
        "emr": "a mask for each task",
        "bitdelta": "a mask for each task",
        "randes": "a mask for each task",
        "esm_pp": "routed experts",
        "smile": "routed experts",
        "adamerging": "method",
    }
    assert (
        found["emr"]["normalised"]["mean"]
        == found["tall"]["normalised"]["mean"]
        == found["esm_pp"]["normalised"]["mean"]
        == found["smile"]["normalised"]["mean"]
        == 1
    )
    assert found["adamerging"]["chosen"] == [{"steps": 3, "start": 0.8}]
    # what is larger than one model is named beside the verdict, not in its place
    said = json.loads((tmp_path / "results.json").read_text())["verdict"]
    assert said["method"] in ("task_arithmetic", "adamerging")
    assert "emr (a mask for each task) keeps 100.0 %" in said["text"]
    with pytest.raises(InputError, match="filter"):
        candidate("emr", experts=T, filters=["trim"])
    with pytest.raises(InputError, match="density"):
        candidate("emr", experts=T, options={"density": 0.1})


def test_methods_that_learn_get_small_batches_and_labels_where_they_take_them(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(line: Lineage) -> Any:
        seen.update(plain=line.batches(), labelled=line.batches(labels=True))
        return line.base

    asked = [Candidate("look", look), candidate("frank_wolfe", experts=T, options={"steps": 4, "stride": 0.5})]
    found = by_name(compare(tasks(), lineage(), asked, folder=tmp_path, proxy_rows=24))
    assert [len(x) for x in seen["plain"]["left"]] == [16, 16, 8]
    x, y = seen["labelled"]["middle"][0]
    assert torch.equal(y, (x[:, 2] > 0).long())
    # labels are those of the first half; the second one judges what was learned from them
    known = torch.cat([x for x, _ in seen["labelled"]["middle"]])
    assert sorted(known[:, 2].tolist()) == sorted(tasks()[1].validation.inputs[:20, 2].tolist())
    # Frank-Wolfe is given labels, and the better of two starts is chosen; what is said stays
    assert found["frank_wolfe"]["chosen"][0]["labels"] is True
    assert [t["options"] for t in found["frank_wolfe"]["tried"][0]] == [{"start": 0.3}, {"start": 0.3333}]


def test_what_learns_labels_by_heart_is_judged_by_others(tmp_path: Path) -> None:
    """A model that is right about the rows it was given, and wrong about all others, scores nothing on validation."""

    class ByHeart(nn.Module):
        def __init__(self, name: str, line: Lineage) -> None:
            super().__init__()
            self.rows = {tuple(r) for r in line.labelled[name].inputs.tolist()}
            self.expert = build(name, line.experts[name])

        def forward(self, x: Tensor) -> Tensor:
            known = [tuple(r) in self.rows for r in x.tolist()]
            return self.expert(x) * torch.where(torch.tensor(known), 1.0, -1.0)[:, None]

    learnt = [
        Candidate(n, lambda line: {t: ByHeart(t, line) for t in NAMES}, labels=labels)
        for n, labels in (("by heart", True), ("by heart, judged by all", False))
    ]
    found = by_name(compare(tasks(), lineage(), learnt, folder=tmp_path))
    assert found["by heart"]["validation_score"] == 0
    assert found["by heart, judged by all"]["validation_score"] == 0.5


def test_what_is_finished_is_kept(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str, fails: type[BaseException] | None = None) -> Candidate:
        def make(line: Lineage) -> Any:
            calls.append(name)
            if fails is not None:
                raise fails
            return line.base

        return Candidate(name, make)

    with pytest.raises(KeyboardInterrupt):
        compare(tasks(), lineage(), [counted("one"), counted("two", KeyboardInterrupt)], folder=tmp_path)
    assert not (tmp_path / "results.json").exists()
    resumed = compare(tasks(), lineage(), [counted("one"), counted("two")], folder=tmp_path)
    assert calls == ["one", "two", "two"]
    unbroken = compare(tasks(), lineage(), [counted("one"), counted("two")], folder=tmp_path / "other")
    timed = ("seconds", "search_seconds", "peak_bytes", "tried")
    for a, b in zip(resumed["candidates"], unbroken["candidates"], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    calls.clear()
    stored = tmp_path / "candidates/one_seed-0.safetensors"
    stored.write_bytes(stored.read_bytes()[:50])
    compare(tasks(), lineage(), [counted("one"), counted("two")], folder=tmp_path)
    assert calls == ["one"]
    compare(tasks(), lineage(), [counted("one"), counted("two")], folder=tmp_path, fingerprint="other files")
    assert calls == ["one", "one", "two"]


def test_what_cannot_take_part_is_named(tmp_path: Path) -> None:
    partial = Candidate("partial", lambda line: {"left": line.base})
    found = compare(tasks(), lineage(), [partial, merged("model_stock", experts=T)], folder=tmp_path)
    assert [x["name"] for x in found["left_out"]] == ["partial"]
    assert "middle" in found["left_out"][0]["reason"]
    assert "model_stock" in by_name(found)


def test_seeds_are_lineages(tmp_path: Path) -> None:
    """One seed's experts are no better than its base: half of the mean, and an interval that reaches from one to the other."""

    def of_seed(seed: int) -> Lineage:
        line = lineage()
        if seed:
            line.base["body.weight"][:] = -torch.eye(2 * T)
        return line

    found = by_name(
        compare(tasks(), of_seed, [Candidate("still", lambda line: line.base)], folder=tmp_path, seeds=(0, 1))
    )
    still = found["still"]["normalised"]
    assert still["mean"] == 0.5
    assert still["high"] - still["low"] >= 1
    assert len(found["task_arithmetic"]["chosen"]) == 2


@settings(max_examples=25)
@given(experts=st.integers(2, 20), trials=st.integers(6, 20))
def test_every_method_tries_as_many_settings(experts: int, trials: int) -> None:
    for method in MERGERS:
        axes = grid(method, experts, trials, {})
        search, count = Settings(axes), 0
        while search.next() is not None:
            search.tell(0.0)
            count += 1
        assert count == trials if "scale" in method.options else count <= trials
        assert all(len(set(v)) == len(v) for v in axes.values())


@given(
    a=st.lists(st.integers(-9, 9), min_size=1, max_size=6, unique=True),
    b=st.lists(st.integers(-9, 9), min_size=1, max_size=6, unique=True),
)
def test_a_separable_score_is_searched_to_its_top(a: list[int], b: list[int]) -> None:
    search = Settings({"a": a, "b": b})
    while (asked := search.next()) is not None:
        search.tell(-abs(asked["a"] - 2) - asked["b"] ** 2)
    assert search.score == max(-abs(x - 2) for x in a) + max(-(y**2) for y in b)


FACTORY = """
import torch
class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.head = torch.nn.Linear({n}, {n}, bias=False), torch.nn.Linear({n}, classes, bias=False)
    def forward(self, x):
        return self.head(self.body(x))
def net(state):
    return Net(len(state["head.weight"]))
def nothing(state):
    return None
def still(lineage, factor=1.0):
    return {{n: factor * v for n, v in lineage.base.items()}}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A comparison's file with models and data beside it."""
    line = lineage()
    save_file(dict(line.base), tmp_path / "base.safetensors")
    (tmp_path / "nets.py").write_text(FACTORY.format(n=2 * T))
    entries = []
    for task in tasks():
        save_file(dict(line.experts[task.name]), tmp_path / f"{task.name}-0.safetensors")
        y = task.validation.targets[task.name]
        np.savez(tmp_path / f"{task.name}-validation.npz", inputs=task.validation.inputs.numpy(), labels=y.numpy())
        save_file(
            {"inputs": task.test.inputs, "labels": task.test.targets[task.name]},
            tmp_path / f"{task.name}-test.safetensors",
        )
        files = {"validation": f"{task.name}-validation.npz", "test": f"{task.name}-test.safetensors"}
        entries.append({"name": task.name, "expert": f"{task.name}-{{seed}}.safetensors", **files})
    said = {"base": "base.safetensors", "model": "nets.py:net", "head": "head.*", "trials": 6, "tasks": entries}
    (tmp_path / "compare.yml").write_text(json.dumps(said))
    return tmp_path / "compare.yml"


def polytask(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["merge", "compare", *map(str, arguments)])


def test_the_command_writes_and_prints(written: Path) -> None:
    done = polytask(written, "--out", written.parent / "out", "--methods", "average,ties,regmean")
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    for name in ("experts", "base", "task_arithmetic", "average", "ties", "regmean"):
        assert name in done.stdout
    page = (written.parent / "out/report.html").read_text()
    assert "default-src 'none'" in html.unescape(page)
    assert all(f'id="{part}"' in page for part in ("results", "methods", "tasks", "interference", "cost", "budget"))
    results = json.loads((written.parent / "out/results.json").read_text())
    named = ("--methods", "average, ties", "--method", "regmean")
    again = polytask(written, "--out", written.parent / "out", *named, "--json")
    assert json.loads(again.stdout) == results


def test_own_functions_and_filters_join(written: Path) -> None:
    said = json.loads(written.read_text())
    said["methods"] = [
        {"candidate": "nets.py:still", "factor": [0.5, 1.0]},
        {"method": "task_arithmetic", "filters": ["trim"], "scale": [0.4, 0.8]},
        {"method": "ties", "density": 0.5, "name": "ties, half"},
    ]
    written.write_text(json.dumps(said))
    done = polytask(written, "--out", written.parent / "out", "--json")
    assert done.exit_code == 0, done.stderr
    found = by_name(json.loads(done.stdout))
    assert set(found) == {"experts", "base", "task_arithmetic", "still", "trim+task_arithmetic", "ties, half"}
    assert found["trim+task_arithmetic"]["chosen"] == [{"scale": 0.8}]
    assert found["ties, half"]["chosen"][0]["density"] == 0.5


def change(file: Path, **said: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | said))


def change_task(file: Path, **said: Any) -> None:
    whole = json.loads(file.read_text())
    whole["tasks"][1] |= said
    file.write_text(json.dumps(whole))


def spoil(name: str, **arrays: Any) -> Callable[[Path], None]:
    return lambda f: np.savez(f.parent / name, **arrays)


WRONG: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "unknown key": (lambda f: change(f, scale=1), "scale", 2),
    "no YAML": (lambda f: f.write_text("{"), "not a YAML file", 2),
    "no tasks": (lambda f: change(f, tasks=[]), "no tasks", 2),
    "no test": (lambda f: change_task(f, test=None), "says no test", 2),
    "same name": (lambda f: change_task(f, name="left"), "same name", 2),
    "unknown method": (lambda f: change(f, methods=["tise"]), "ties", 2),
    "unknown option": (lambda f: change(f, methods=[{"method": "ties", "rank": 3}]), "no option 'rank'", 2),
    "unknown filter": (lambda f: change(f, methods=[{"method": "ties", "filters": ["trin"]}]), "trim", 2),
    "no trial": (lambda f: change(f, trials=0), "trials", 2),
    "missing expert": (lambda f: change_task(f, expert="none.safetensors"), "none.safetensors", 5),
    "missing data": (lambda f: change_task(f, test="none.npz"), "none.npz", 5),
    "other format": (lambda f: change_task(f, test="nets.py"), "neither", 2),
    "no labels": (spoil("middle-validation.npz", inputs=np.zeros((3, 6), np.float32)), "holds no labels", 2),
    "labels of floats": (
        spoil("middle-validation.npz", inputs=np.zeros((2, 6)), labels=np.zeros(2)),
        "whole number",
        2,
    ),
    "rows": (spoil("middle-validation.npz", inputs=np.zeros((3, 6)), labels=np.zeros(2, int)), "3 rows", 2),
    "a class too many": (
        spoil("middle-validation.npz", inputs=np.zeros((2, 6), np.float32), labels=np.array([0, 7])),
        "go up to 7",
        2,
    ),
    "pickled arrays": (
        spoil("middle-validation.npz", inputs=np.array([{}]), labels=np.zeros(1, int)),
        "arrays of numbers",
        5,
    ),
    "no function": (lambda f: change(f, model="nets.py:net2"), "net2", 2),
    "no module": (lambda f: change(f, model="nets.py:nothing"), "NoneType", 2),
    "no configuration": (lambda f: change(f, model=None), "config.json", 2),
    "head of nothing": (lambda f: change(f, head="haed.*"), "head.weight", 2),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence(written: Path, case: str) -> None:
    spoiled, named, code = WRONG[case]
    spoiled(written)
    done = polytask(written, "--out", written.parent / "out")
    assert done.exit_code == code, done.output
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (written.parent / "out/results.json").exists()


def test_folders_of_transformers(tmp_path: Path) -> None:
    """Its files hold tensors under older names than its models do: statistics and routed experts must meet them all the same."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    entries = []
    for seed, (name, classes) in enumerate([("base", 7), ("one", 2), ("two", 3)]):
        torch.manual_seed(seed)
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, num_channels=1, num_labels=classes, initializer_range=0.3)
        ).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            y = model(pixel_values=x).logits.argmax(-1)
        save_file({"pixel_values": x, "labels": y}, tmp_path / f"{name}.safetensors")
        data = f"{name}.safetensors"
        entries.append({"name": name, "expert": name, "validation": data, "test": data})
    said = {"base": "base", "head": "classifier.*", "tasks": entries[1:], "methods": ["regmean", "esm_pp", "average"]}
    (tmp_path / "compare.yml").write_text(json.dumps(said))
    done = polytask(tmp_path / "compare.yml", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["left_out"] == []
    assert by_name(results)["experts"]["mean_accuracy"]["mean"] == 1
    assert by_name(results)["regmean"]["statistic_seconds"] > 0


def test_seeds_of_the_command_line(written: Path) -> None:
    for name in NAMES:
        (written.parent / f"{name}-7.safetensors").write_bytes((written.parent / f"{name}-0.safetensors").read_bytes())
    done = polytask(written, "--out", written.parent / "out", "--methods", "average", "--seeds", "0,7", "--json")
    assert json.loads(done.stdout)["budget"]["seeds"] == [0, 7]
    assert "--seeds" in polytask(written, "--out", written.parent / "out", "--seeds", "a").stderr


def test_a_model_called_compare_is_still_merged(written: Path) -> None:
    (written.parent / "compare").write_bytes((written.parent / "base.safetensors").read_bytes())
    arguments = [
        "merge",
        written.parent / "base.safetensors",
        written.parent / "left-0.safetensors",
        "--skip",
        "head.*",
        "--dry-run",
    ]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.stderr
    assert "task_arithmetic" in done.stdout


def test_nothing_without_an_expert_that_knows_its_task(tmp_path: Path) -> None:
    line = lineage()
    line.experts["left"]["head.weight"].neg_()
    with pytest.raises(InputError, match="left"):
        compare(tasks(), line, [], folder=tmp_path)


def test_heads_of_other_sizes_do_not_keep_statistics_from_being_used(tmp_path: Path) -> None:
    """The base's head has five outputs and the experts' two; statistics of heads are of no tensor that is merged."""
    found = compare(tasks(), lineage(), [merged(m, experts=T) for m in ("fisher", "regmean")], folder=tmp_path)
    assert {"fisher", "regmean"} <= set(by_name(found))
    assert found["left_out"] == []


@pytest.mark.parametrize("trials", [2, 6, 12, 20])
def test_every_setting_of_the_default_grids_is_one_that_the_method_takes(trials: int) -> None:
    without_data = [m for m in MERGERS if issubclass(m.factory, Merger) and m.needs != "statistics"]
    for method in without_data:
        experts = [{"w": torch.eye(8)}] * (method.factory.most or T)
        for option, values in grid(method, T, trials, {}).items():
            for value in values:
                made = merge({"w": torch.zeros(8, 8)}, experts, method.name, **{**method.example, option: value})
                assert torch.isfinite(made["w"]).all(), (method.name, option, value)


def test_experts_are_measured_by_themselves_in_every_lineage(tmp_path: Path) -> None:
    def of_seed(seed: int) -> Lineage:
        line = lineage()
        if seed:
            line.experts["left"]["head.weight"] = head(1)  # looks elsewhere, and is right by chance
        return line

    found = by_name(compare(tasks(), of_seed, [], folder=tmp_path, seeds=(0, 1)))
    assert found["experts"]["validation_score"] == pytest.approx(1.0)


def test_another_seed_leaves_the_first_one_s_results(written: Path) -> None:
    for name in NAMES:
        first = written.parent / f"{name}-0.safetensors"
        (written.parent / f"{name}-1.safetensors").write_bytes(first.read_bytes())
    one, both = (read_comparison(written, seeds=s) for s in ((0,), (0, 1)))
    assert one.fingerprint(0) == both.fingerprint(0) != both.fingerprint(1)

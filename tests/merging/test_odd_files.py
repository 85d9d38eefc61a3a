"""Files, folders and arguments as users have them: links, empty folders, headers and indexes that lie, proxy inputs that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from polytask.cli import app
from polytask.errors import InputError, StorageError
from polytask.merging import gather_gramians, merge
from polytask.merging.checkpoint import open_checkpoint
from polytask.merging.on_disk import MergePlan, write

from .conftest import State, distance


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, State]:
    """A base and two experts in files, and what makes a network that they fit."""
    found = {}
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        found[name] = dict(net().state_dict())
        save_file(found[name], tmp_path / f"{name}.safetensors")
    (tmp_path / "net.py").write_text(FACTORY)
    return found


def polytask(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def plan(folder: Path) -> MergePlan:
    return MergePlan([folder / "one.safetensors", folder / "two.safetensors"], folder / "base.safetensors")


# --- where the result goes


def test_an_empty_folder_may_be_there(models: dict[str, State], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(plan(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(InputError, match="out exists already"):
        write(plan(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_to_where_the_result_goes(models: dict[str, State], tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "merge.json").write_text("{}")
        (tmp_path / "disk" / "old").write_text("")
    (tmp_path / "out").symlink_to("disk")
    write(plan(tmp_path), tmp_path / "out", overwrite=there)
    assert (tmp_path / "out").is_symlink()
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["merge.json", "model.safetensors"]
    assert not list(tmp_path.glob(".*"))


# --- what is read


def with_header(file: Path, header: Any, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([1, 2], "names no tensors"),
        ({"w": [1]}, "the entry of w in its header is incomplete"),
        ({"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "the entry of w"),
        ({"w": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, "the entry of w"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "the entry of w"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_checkpoint(with_header(tmp_path / "m.safetensors", header, b"\0" * 8))


def test_an_index_of_more_than_there_is(models: dict[str, State], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file(models["one"], tmp_path / "m" / "model-00001-of-00001.safetensors")
    where = dict.fromkeys([*models["one"], "ghost"], "model-00001-of-00001.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(StorageError, match="names the tensor ghost, which none of its shards holds"):
        open_checkpoint(tmp_path / "m")


# --- proxy inputs


def esm(folder: Path, arrays: Mapping[str, Any]) -> Result:
    np.savez(folder / "data.npz", **arrays)
    names = (folder / f"{n}.safetensors" for n in ("base", "one", "two"))
    data = ("--proxy", folder / "data.npz", "--model", f"{folder / 'net.py'}:net")
    return polytask("merge", *names, "--method", "esm", *data, "--out", folder / "out")


def test_inputs_of_any_float_dtype(models: dict[str, State], tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 6))
    assert esm(tmp_path, {"inputs": x}).exit_code == 0
    seen = []
    for name in ("one", "two"):
        model = net()
        model.load_state_dict(models[name])
        seen.append(gather_gramians(model, [torch.from_numpy(x).float()]))
    expected = merge(models["base"], [models["one"], models["two"]], "esm", statistics=seen)
    assert distance(load_file(tmp_path / "out" / "model.safetensors"), expected) < 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_no_numbers(models: dict[str, State], tmp_path: Path, value: float) -> None:
    done = esm(tmp_path, {"inputs": np.full((20, 6), value)})
    assert (done.exit_code, "the array inputs of" in done.stderr and "holds NaN or infinite values" in done.stderr) == (
        2,
        True,
    )
    done = esm(tmp_path, {"inputs": np.array(["a"] * 20)})
    assert (done.exit_code, "arrays of what is no number" in done.stderr) == (2, True)
    assert not list(tmp_path.glob("*out*"))


# --- arguments beside a configuration


@pytest.mark.parametrize("more", [("--method", "ties"), ("--dtype", "float16"), ("--seed", 3), ("--set", "scale=1")])
def test_a_file_says_how_to_merge(models: dict[str, State], tmp_path: Path, more: tuple[object, ...]) -> None:
    text = "models: [{model: one.safetensors}]\nbase_model: base.safetensors\nmerge_method: ties\n"
    (tmp_path / "merge.yml").write_text(text)
    done = polytask("merge", tmp_path / "merge.yml", tmp_path / "out", *more)
    assert (done.exit_code, "says how to merge: leave out --method" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: [ties]\nmodels: [{model: one.safetensors}]", "a method is given by its name"),
        ("merge_method: ties\nslices: [3]", "are not a list of slices"),
        ("merge_method: average\nmodels: [{model: one.safetensors}]\nseed: abc", "the seed in .* is a whole number"),
        (
            "merge_method: linear\nmodels: [{model: one.safetensors, parameters: {weight: [{filter: a}]}}]",
            "written with filter and value",
        ),
    ],
)
def test_files_that_say_something_else(models: dict[str, State], tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "merge.yml").write_text(text)
    done = polytask("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert done.exit_code == 2
    assert re.search(said, done.stderr), done.stderr


def test_a_method_that_runs_the_model_asks_for_inputs(models: dict[str, State], tmp_path: Path) -> None:
    names = (tmp_path / f"{n}.safetensors" for n in ("base", "one", "two"))
    done = polytask("merge", *names, "--method", "adamerging", "--out", tmp_path / "out")
    assert (done.exit_code, "adamerging looks at data: name a few dozen inputs" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("density=0.5,0.25", [0.5, 0.25]),
        ("density=[0.5, 0.25]", [0.5, 0.25]),
        ("density=.5", 0.5),
        ("scale=5e-1", 0.5),
        ("normalize=false", False),
    ],
)
def test_settings(models: dict[str, State], tmp_path: Path, setting: str, found: Any) -> None:
    names = [tmp_path / f"{n}.safetensors" for n in ("base", "one", "two")]
    done = polytask("merge", *names, "--method", "ties", "--set", setting, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    expected = merge(models["base"], [models["one"], models["two"]], "ties", **{setting.partition("=")[0]: found})
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[n], v) for n, v in expected.items())


@pytest.mark.parametrize("argument", [("--set", "density=[0.5"), ("--filter", "trim:density=[0.1")])
def test_settings_that_cannot_be_read(models: dict[str, State], tmp_path: Path, argument: tuple[str, str]) -> None:
    names = [tmp_path / f"{n}.safetensors" for n in ("base", "one", "two")]
    done = polytask("merge", *names, *argument, "--out", tmp_path / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "written" in done.stderr


def test_quantized_weights_are_not_passed_over() -> None:
    state = {"fc.weight": torch.ones(4, 4, dtype=torch.uint8), "fc.bias": torch.ones(4), "steps": torch.tensor(3)}
    with pytest.raises(InputError, match=r"fc\.weight of the base holds weights as uint8: quantized models"):
        merge(state, [state])
    assert merge(state, [state], skip="fc.weight")["steps"] == 3


def test_a_folder_of_something_else_is_not_replaced(models: dict[str, State], tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"precious holds thesis\.txt and no model: name another folder"):
        write(plan(tmp_path), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"

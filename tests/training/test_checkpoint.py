"""Checkpoints: any tree comes back bit by bit, and a write that fails leaves the former one."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytask.errors import InputError, StorageError
from polytask.training import Progress, TrainConfig, load_checkpoint, save_checkpoint, train
from polytask.training.checkpoint import clear_unfinished, generator_states, restore_generators

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**128), max_value=2**128),  # PCG64 keeps 128-bit integers
    st.floats(),
    st.text(max_size=8),
    st.lists(st.floats(width=32), max_size=4).map(lambda v: torch.tensor(v, dtype=torch.float32)),
    st.lists(st.integers(0, 255), max_size=4).map(lambda v: np.array(v, dtype=np.uint8)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
    ),
    max_leaves=12,
)


def alike(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor | np.ndarray):
        first, second = (t.numpy() if isinstance(t, torch.Tensor) else t for t in (a, b))
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and np.isnan(a) and np.isnan(b))


@given(tree=trees)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back(tree: object, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tree", tree)
    assert alike(load_checkpoint(tmp_path / "tree"), tree)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_every_dtype_and_layout_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(12).reshape(3, 4).to(dtype)
    tree = {"strided": base.T, "part": base[1:, ::2], "scalar": base[0, 1], "empty": base[:0], "again": base.T}
    save_checkpoint(tmp_path / "c", tree)
    back = load_checkpoint(tmp_path / "c")
    assert all(torch.equal(back[n], tree[n]) and back[n].dtype == dtype for n in tree)


def test_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002 - the global generators are what is under test
    state = generator_states()
    draw = lambda: (random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item())  # noqa: E731, NPY002
    expected = [draw() for _ in range(3)]
    save_checkpoint(tmp_path / "g", state)
    restore_generators(load_checkpoint(tmp_path / "g"))
    assert [draw() for _ in range(3)] == expected


def test_what_cannot_be_written_without_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not set"):
        save_checkpoint(tmp_path / "c", {"a": {1, 2}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_told(share: float, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, {"a": torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StorageError, match=f"the checkpoint {path} is damaged"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoint_are_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(StorageError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "other")
    with pytest.raises(StorageError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nothing")


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, 1)
    (tmp_path / ".c.abc.part").write_bytes(b"half")
    clear_unfinished(path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_write_that_fails_keeps_the_former_checkpoint(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, "former")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file" if step == "save_file" else f"os.{step}", full)
    with pytest.raises(StorageError, match=r"cannot be written \(.*No space left.*the checkpoint before it is intact"):
        save_checkpoint(path, "new")
    monkeypatch.undo()
    assert load_checkpoint(path) == "former"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_a_sentence_and_a_run_that_can_be_resumed(diabetes, same, tiny_disk: Path) -> None:
    config = TrainConfig(epochs=4, batch_size=64, device="cpu")
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    unbroken = diabetes.model(dropout=0.2)
    train(unbroken, *arguments, balancer="uncertainty", config=config)
    ballast = tiny_disk / "ballast"

    def fill(progress: Progress) -> None:
        if progress.epoch < 2 or ballast.exists():
            return
        file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):  # until nothing more fits
            while True:
                os.write(file, bytes(4096))
        os.close(file)

    model = diabetes.model(dropout=0.2)
    with pytest.raises(StorageError, match="cannot be written"):
        train(model, *arguments, balancer="uncertainty", config=config, folder=tiny_disk / "run", progress=fill)
    assert load_checkpoint(tiny_disk / "run" / "checkpoint.safetensors")["epoch"] == 1
    ballast.unlink()
    resumed = diabetes.model(dropout=0.2)
    train(resumed, *arguments, balancer="uncertainty", config=config, folder=tiny_disk / "run", resume=True)
    assert same(unbroken, resumed)


def test_a_checkpoint_of_another_run_is_refused(diabetes, digits, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, batch_size=128, device="cpu")
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    train(diabetes.model(), *arguments, config=config, folder=tmp_path)
    with pytest.raises(InputError, match=r"was made with learning_rate 0\.001, not 0\.01"):
        train(diabetes.model(), *arguments, config=config.but(learning_rate=0.01), folder=tmp_path, resume=True)
    with pytest.raises(InputError, match="was made with the balancing method 'equal', not 'mgda'"):
        train(diabetes.model(), *arguments, balancer="mgda", config=config, folder=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"was made with tasks \['progression', 'sex', 'pressure'\]"):
        train(
            digits.model(), digits.tasks, digits.train, digits.validation, config=config, folder=tmp_path, resume=True
        )
    wider = diabetes.model()
    wider.trunk[0] = torch.nn.Linear(8, 30)
    with pytest.raises(InputError, match=r"holds the weights of another model: .*size mismatch"):
        train(wider, *arguments, config=config, folder=tmp_path, resume=True)
    with pytest.raises(InputError, match="needs the folder"):
        train(diabetes.model(), *arguments, config=config, resume=True)


def test_logs_hold_every_epoch_once_after_a_resumption(diabetes, tmp_path: Path) -> None:
    import csv
    import json

    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(epochs=2, batch_size=128, device="cpu")
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    train(diabetes.model(), *arguments, config=config, folder=tmp_path, trackers=["tensorboard"])
    longer = train(
        diabetes.model(),
        *arguments,
        config=config.but(epochs=4),
        folder=tmp_path,
        resume=True,
        trackers=["tensorboard"],
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in lines] == [1, 2, 3, 4]
    assert [row["sex/roc_auc"] for row in lines] == longer.history["validation"]["sex"]["roc_auc"]
    assert [float(row["pressure/weight"]) for row in table] == longer.history["weights"]["pressure"]
    assert [float(row["sex/gradient_norm"]) for row in table] == [row["sex/gradient_norm"] for row in lines]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = events.Scalars("progression/rmse")
    assert [e.step for e in seen] == [1, 2, 3, 4]
    assert [e.value for e in seen] == pytest.approx(longer.history["validation"]["progression"]["rmse"], rel=1e-6)


def test_a_tracker_that_does_not_exist_is_told(diabetes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tracker called 'wandb'"):
        train(diabetes.model(), diabetes.tasks, diabetes.train, folder=tmp_path, trackers=["wandb"])
    with pytest.raises(InputError, match="needs a folder"):
        train(diabetes.model(), diabetes.tasks, diabetes.train, trackers=["tensorboard"])

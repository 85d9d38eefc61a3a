"""A run killed with SIGKILL at any moment and started again ends with the weights of an unbroken run, bit by bit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 - loaded before the forks, so that these need not
import pytest
import sklearn.metrics  # noqa: F401
import torch
from torch.utils.data import DataLoader, Dataset

from polytask.training import TrainConfig, load_checkpoint, save_checkpoint, train
from polytask.training.state import CHECKPOINT

CONFIG = TrainConfig(
    epochs=5,
    batch_size=48,
    learning_rate=3e-3,
    schedule="cosine",
    warmup=0.1,
    checkpoint_every=2,
    observe_every=2,
    device="cpu",
    seed=3,
)
HISTORY_OF_TIME = ("seconds",)


class Noisy(Dataset):
    """Rows that are augmented with the global generator, as image pipelines do."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        x = self.data.inputs[i]
        return x + 0.1 * torch.randn_like(x), {n: t[i] for n, t in self.data.targets.items()}


def run(problem: Any, folder: Path, balancer: str, options: dict[str, Any]) -> None:
    """One attempt, in a process of its own: go on from what is there, and leave the outcome."""
    data = (
        DataLoader(Noisy(problem.train), batch_size=48, shuffle=True) if options.pop("loader", False) else problem.train
    )
    if options.pop("slow_disk", False):
        os.replace = partial(linger, os.replace)  # in this process alone
    model = problem.model(dropout=0.3)
    model.register_forward_hook(lambda *_: time.sleep(0.01))  # slow enough for whoever watches
    config = CONFIG.but(**options)
    result = train(
        model, problem.tasks, data, problem.validation, balancer=balancer, config=config, folder=folder, resume=True
    )
    history = {k: v for k, v in result.history.items() if k not in HISTORY_OF_TIME}
    save_checkpoint(folder / "outcome", {"weights": model.state_dict(), "history": history, "best": result.best_epoch})


def linger(replace: Callable[..., None], *paths: Any) -> None:
    time.sleep(0.1)
    replace(*paths)


def start(*arguments: Any) -> Any:
    # a fork of this process has torch loaded already: an attempt takes its own time only
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    return process


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)  # ended or not, it is still ours until it is joined
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)


def await_writes(process: Any, folder: Path, pattern: str, count: int) -> None:
    """Until ``count`` new files have appeared under a name (a checkpoint replaced is a new file), or the process has ended."""
    seen: set[tuple[int, int]] = set()
    known: int | None = None
    while process.exitcode is None and (known is None or len(seen) < known + count):
        with contextlib.suppress(FileNotFoundError):  # moved away while it was looked at
            seen |= {(s.st_ino, s.st_mtime_ns) for s in (p.stat() for p in folder.glob(pattern))}
        known = len(seen) if known is None else known
        time.sleep(0.002)


def steps_saved(folder: Path) -> int:
    path = folder / CHECKPOINT
    return int(load_checkpoint(path)["steps"]) if path.exists() else 0


def assert_same(first: Any, second: Any) -> None:
    assert first["best"] == second["best"]
    assert first["history"] == second["history"]
    assert all(torch.equal(t, second["weights"][n]) for n, t in first["weights"].items())


def finish(problem: Any, folder: Path, balancer: str, options: dict[str, Any]) -> Any:
    process = start(problem, folder, balancer, options)
    process.join()
    assert process.exitcode == 0
    assert not list(folder.glob("*.part")) + list(folder.glob(".*.part"))
    return load_checkpoint(folder / "outcome")


@pytest.mark.parametrize(
    ("balancer", "options"),
    [
        ("equal", {}),
        ("famo", {}),
        ("uncertainty", {"accumulate": 2, "level": "exact"}),
        ("nash_mtl", {"precision": "bf16"}),
        ("rlw", {"loader": True}),
    ],
)
def test_killed_at_random_moments(diabetes, tmp_path: Path, balancer: str, options: dict[str, Any]) -> None:
    expected = finish(diabetes, tmp_path / "unbroken", balancer, options)
    moments, broken, stood = random.Random(balancer), tmp_path / "broken", [0]
    for _ in range(4):
        process = start(diabetes, broken, balancer, options)
        await_writes(process, broken, CHECKPOINT, moments.randint(0, 4))
        time.sleep(moments.uniform(0, 0.03))
        kill(process)
        stood.append(steps_saved(broken))
    assert stood == sorted(stood)  # nothing that was saved is ever lost
    assert 0 < stood[-1] < 35
    assert_same(expected, finish(diabetes, broken, balancer, options))


def test_killed_while_a_checkpoint_is_written(diabetes, tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "epochs": 3}
    expected = finish(diabetes, tmp_path / "unbroken", "famo", options)
    broken, struck, stood = tmp_path / "broken", 0, [0]
    for attempt in range(4):
        process = start(diabetes, broken, "famo", {**options, "slow_disk": True})
        await_writes(process, broken, ".*.part", 1 + attempt)
        kill(process)
        struck += any(broken.glob(".*.part"))
        stood.append(steps_saved(broken))
    assert struck, "no kill fell into a write"
    assert stood == sorted(stood)
    assert stood[-1] > 0
    assert_same(expected, finish(diabetes, broken, "famo", options))


def test_killed_between_any_two_steps(diabetes, tmp_path: Path) -> None:
    """Every single step as the place to break, in one process: a checkpoint of each is resumed to the end."""
    options = {"checkpoint_every": 1, "epochs": 2, "observe_every": 0}
    config, kept = CONFIG.but(**options), []
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)

    def keep(path: Path, tree: Any) -> None:
        save_checkpoint(path, tree)
        kept.append(path.read_bytes())

    whole = diabetes.model(dropout=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polytask.training.state.save_checkpoint", keep)
        train(whole, *arguments, balancer="db_mtl", config=config, folder=tmp_path / "whole")
    assert len(kept) == 2 * 7 + 2
    for i, content in enumerate(kept):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / CHECKPOINT).write_bytes(content)
        model = diabetes.model(dropout=0.3, seed=99)
        train(model, *arguments, balancer="db_mtl", config=config, folder=folder, resume=True)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True)), i


def test_a_finished_run_is_not_run_again(diabetes, tmp_path: Path) -> None:
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    first, second = diabetes.model(), diabetes.model(seed=1)
    done = train(first, *arguments, config=CONFIG, folder=tmp_path)
    again = train(second, *arguments, config=CONFIG, folder=tmp_path, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert (again.steps, again.best_epoch, again.history) == (done.steps, done.best_epoch, done.history)


def test_another_number_of_threads_is_told(diabetes, tmp_path: Path) -> None:
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    train(diabetes.model(), *arguments, config=CONFIG.but(epochs=1, schedule="constant"), folder=tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.warns(UserWarning, match=f"began with {before} threads and goes on with {before + 1}"):
            train(
                diabetes.model(),
                *arguments,
                config=CONFIG.but(epochs=2, schedule="constant"),
                folder=tmp_path,
                resume=True,
            )
    finally:
        torch.set_num_threads(before)

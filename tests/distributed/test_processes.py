"""Two and four processes take the step of one process with all examples, and stay the same to the last bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polytask.registry import find

WORKER = Path(__file__).with_name("worker.py")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.timeout(1200),
]


def launch(scene: str, processes: int, folder: Path) -> list[Any]:
    """What each process found, launched by torchrun."""
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launched = subprocess.run(
        [*torchrun, str(processes), str(WORKER), scene, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    # torchrun may abort in a thread of its own as it ends, after all workers ended well; a worker's end it would report
    ended = launched.returncode == 0 or launched.stderr.strip() == "terminate called without an active exception"
    assert ended, launched.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def alone() -> Any:
    """The worker's functions, in this process."""
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", [2, 4])
def test_every_method_takes_the_step_of_one_process(processes: int, tmp_path: Path) -> None:
    found = launch("every_method", processes, tmp_path)
    worker = alone()
    assert len(found[0]) > 40
    for (name, level), (parameters, gradients) in found[0].items():
        for other in found[1:]:
            for key, tensor in other[name, level][0].items():
                assert torch.equal(tensor, parameters[key]), (name, level, key)
        _, expected = worker.train(find(name), level, 3, None, processes)
        for step, (g, e) in enumerate(zip(gradients, expected, strict=True)):
            difference = float((g - e).norm() / e.norm())
            assert difference < 1e-6, (name, level, step, difference)


def test_bytes_exchanged(tmp_path: Path) -> None:
    for rank in launch("volume", 2, tmp_path):
        K, P, own = 3, rank["P"], rank["own"]
        agreed, gramian, weights = 3 * K * 8, K * K * 8, K * 8
        assert rank["linear"] == {"all_reduce": agreed + gramian, "broadcast": weights}
        exact = rank["exact"]
        padded = -(-P // 2) * 2
        assert sum(v for k, v in exact.items() if k.startswith("reduce_scatter")) == K * padded * 8
        assert sum(v for k, v in exact.items() if k.startswith("all_gather")) == padded // 2 * 8
        assert exact["all_reduce"] == agreed + gramian + own * 8
        assert exact["broadcast"] == weights
        assert "all_gather_object" not in exact


def test_sharded_parameters(tmp_path: Path) -> None:
    first, second = launch("sharded", 2, tmp_path)
    worker = alone()
    for (name, deep), gradients in first.items():
        assert all(torch.equal(g, h) for g, h in zip(gradients, second[name, deep], strict=True))
        _, expected = worker.train(find(name), "copies" if deep else "linear", 3, None, 2)
        for g, e in zip(gradients, expected, strict=True):
            assert float((g - e).norm()) < 1e-6 * float(e.norm()), (name, deep)


def test_processes_that_disagree_are_told_so_on_every_process(tmp_path: Path) -> None:
    first, second = launch("refusals", 2, tmp_path)
    assert first == second
    assert "'b' was given on some processes only" in first["missing", "{}"]
    assert "does not know the task 'z'" in first["unknown", "{}"]
    assert first["nan", "{}"] == "the loss of task 'a' is nan: no gradient was touched"
    assert first["nan", "{'on_nonfinite': 'skip-task'}"] == "('b', 'c') ('a',) True"
    assert first["nan", "{'on_nonfinite': 'skip-step'}"] == "() ('a',) False"

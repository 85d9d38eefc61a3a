"""Lightning's own DDP takes the steps of one process with all rows, and its processes stay the same to the last bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the extra polytask[lightning] is not installed")

WORKER = Path(__file__).with_name("lightning_worker.py")
STEPS = 40


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ddp_as_lightning_launches_it(tmp_path: Path) -> None:
    launched = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), str(tmp_path), str(STEPS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    spec = importlib.util.spec_from_file_location("lightning_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    start = {f"model.{n}": p for n, p in worker.network().double().named_parameters()}
    for scene in worker.SCENES:
        assert all(torch.equal(second[scene][n], p) for n, p in first[scene].items()), scene
        # means over rows in another order of summation: a few steps agree to rounding, many amplify it
        if scene != "somebody's":
            expected = worker.run(scene, STEPS, processes=1)
            moved = sum(float((p - start[n].detach()).square().sum()) for n, p in expected.items()) ** 0.5
            missed = sum(float((first[scene][n] - p).square().sum()) for n, p in expected.items()) ** 0.5
            assert missed < 1e-4 * moved, (scene, missed / moved)

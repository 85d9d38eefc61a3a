"""Two processes on the CPU: one direction, replicas that stay the same, and at exact level the step of one process on all rows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polytask.models import HardSharing
from polytask.training import TrainConfig, load_checkpoint, train

WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
from polytask.models import HardSharing
from polytask.tasks import Tasks
from polytask.training import TaskData, TrainConfig, load_checkpoint, save_checkpoint, train
folder = Path(sys.argv[1])
given = load_checkpoint(folder / "given")
tasks = Tasks.from_json(given["tasks"])
data = TaskData(given["inputs"], given["targets"])
outcome = {}
for name, (balancer, options) in given["runs"].items():
    trunk = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.0), nn.Linear(24, 16), nn.Tanh())
    model = HardSharing(trunk, {n: nn.Linear(16, 1) for n in tasks})
    model.load_state_dict(given["weights"])
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    result = train(model, tasks, data, data, balancer=balancer, config=TrainConfig(**options), optimizer=sgd, folder=folder / name)
    outcome[name] = {"weights": model.state_dict(), "score": result.history["score"]}
import os
save_checkpoint(folder / f"outcome{os.environ['RANK']}", outcome)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.timeout(240)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes(diabetes, tmp_path: Path) -> None:
    data, tasks, model = diabetes.train.rows(slice(0, 96)), diabetes.tasks, diabetes.model()
    common = {"epochs": 3, "stop_on": None, "device": "cpu"}
    runs = {
        "exact": ("mgda", {**common, "batch_size": 16, "level": "exact"}),
        "values": ("equal", {**common, "batch_size": 16}),
        "parts": ("modo", {**common, "batch_size": 16}),
        "uphill": ("f_mtl", {**common, "batch_size": 16}),
        "representation": ("mgda", {**common, "batch_size": 16, "accumulate": 2}),
    }
    given = {
        "tasks": tasks.to_json(),
        "inputs": data.inputs,
        "targets": data.targets,
        "weights": model.state_dict(),
        "runs": runs,
    }
    from polytask.training import save_checkpoint

    save_checkpoint(tmp_path / "given", given)
    (tmp_path / "worker.py").write_text(WORKER)
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)],
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [p.communicate()[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    first, second = (load_checkpoint(tmp_path / f"outcome{rank}") for rank in (0, 1))
    for name in runs:
        assert all(torch.equal(t, second[name]["weights"][n]) for n, t in first[name]["weights"].items()), name
        assert first[name]["score"] == second[name]["score"]
    # labels are missing unevenly between the processes, and still the step is that of one process with all rows
    for name in ("exact", "values", "uphill"):
        balancer, options = runs[name]
        alone: HardSharing = diabetes.model()
        sgd = torch.optim.SGD(alone.parameters(), lr=0.05)
        train(
            alone,
            tasks,
            data,
            data,
            balancer=balancer,
            config=TrainConfig(**{**options, "batch_size": 32}),
            optimizer=sgd,
        )
        for n, t in alone.state_dict().items():
            torch.testing.assert_close(t, first[name]["weights"][n], rtol=1e-4, atol=1e-6)

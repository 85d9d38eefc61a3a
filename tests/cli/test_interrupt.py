"""Ctrl-C in a real process: a readable summary, a state that can be resumed, and a run that then ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BUDGET = ("--seeds", "2", "--epochs", "3", "--trials", "2", "--balance", "mgda", "--no-grouping")


def arguments(table: Path, out: Path, workers: int) -> list[str]:
    return ["fit", str(table), "-t", "size", "-t", "bought", "--out", str(out), *BUDGET, "--workers", str(workers)]


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def interrupted(request, table, tmp_path) -> Path:
    """A run that was sent SIGINT after its first training, as Ctrl-C does: its folder."""
    out, workers = tmp_path / "run", request.param
    started = subprocess.Popen(
        [sys.executable, "-m", "polytask", *arguments(table, out, workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(out.glob("work/*/outcome.json")):
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.01)
    # a terminal sends Ctrl-C to every process of the job, workers included
    os.killpg(started.pid, signal.SIGINT)
    stdout, stderr = started.communicate(timeout=200)
    assert started.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("Error: interrupted with ")
    assert "trainings finished" in last
    assert last.endswith(f"kept in {out}: the same command with --resume goes on")
    return out


def test_an_interrupted_run_resumes_to_the_same_end(interrupted, table, tmp_path, polytask):
    out = interrupted
    assert not (out / "results.json").exists()
    resumed = polytask(*arguments(table, out, 1), "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    whole = polytask(*arguments(table, tmp_path / "whole", 1), "--json")
    assert json.loads(resumed.stdout)["tasks"] == json.loads(whole.stdout)["tasks"]
    assert (out / "model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()

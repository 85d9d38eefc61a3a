"""Ctrl-C in a real process: a readable summary, a state that can be resumed, and a run that then ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

BUDGET = ("--seeds", "2", "--epochs", "3", "--trials", "2", "--balance", "mgda", "--no-grouping")


def command(table, out, workers: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "polytask",
        "fit",
        str(table),
        "-t",
        "size",
        "-t",
        "bought",
        "--out",
        str(out),
        *BUDGET,
        "--workers",
        str(workers),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_says_so_and_resumes(table, tmp_path, workers):
    out = tmp_path / "run"
    started = subprocess.Popen(
        command(table, out, workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(out.glob("work/*/outcome.json")):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=120)
    assert started.returncode == 130, stderr
    assert stdout == ""
    last = stderr.strip().splitlines()[-1]
    assert "interrupted with" in last
    assert "trainings finished" in last
    assert "--resume" in last
    assert "Traceback" not in stderr
    assert not (out / "results.json").exists()
    first = next(out.glob("work/*/outcome.json"))
    stamp = first.stat().st_mtime_ns

    if workers == 1:
        resumed = subprocess.Popen(
            [*command(table, out, 1), "--resume", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while resumed.poll() is None and first.exists():
            assert first.stat().st_mtime_ns == stamp, "what was finished is not trained again"
            time.sleep(0.05)
        stdout, stderr = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, stderr
        whole = subprocess.run(
            [*command(table, tmp_path / "whole", 1), "--json"], capture_output=True, text=True, check=True
        )
        assert json.loads(stdout)["tasks"] == json.loads(whole.stdout)["tasks"]
        assert (out / "model/model.safetensors").read_bytes() == (
            tmp_path / "whole/model/model.safetensors"
        ).read_bytes()

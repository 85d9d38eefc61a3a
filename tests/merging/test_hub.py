"""Models named as on the hub: a real server of its kind on this machine, and the real client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from polytask.merging import merge
from polytask.merging.proxy import expert_name

COMMIT = "c0ffee" + "0" * 34
MODELS = ("base", "cars", "digits")


class Hub(BaseHTTPRequestHandler):
    """What the client asks of the hub: a model's files, and their bytes."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(*self.found())

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer(*self.found())

    def found(self) -> tuple[int, bytes, dict[str, str]]:
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        folder = self.root / name
        if name == "org/gated":
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        if not folder.is_dir():
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        about = {"X-Repo-Commit": COMMIT}
        if parts[0] == "api":
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            listed: Any = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": f} for f in files]
            if "tree" not in parts:
                if parts[-1] not in ("main", COMMIT):
                    return 404, b"", {"X-Error-Code": "RevisionNotFound"}
                listed = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            return 200, json.dumps(listed).encode(), {"Content-Type": "application/json", **about}
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound", **about}
        content = file.read_bytes()
        about["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        wanted = self.headers.get("Range")
        if wanted is None:
            return 200, content, about
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        end = int(first) + len(part) - 1
        return 206, part, {**about, "Content-Range": f"bytes {first}-{end}/{len(content)}"}

    def answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"0.weight": torch.randn(40, 6, generator=g), "0.bias": torch.randn(40, generator=g)}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    for seed, name in enumerate(MODELS):
        folder = tmp_path / "hub" / "org" / name
        (folder / "onnx").mkdir(parents=True)
        save_file(state(seed), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "none", "of": name}))
        (folder / "onnx" / "model.onnx").write_bytes(b"not wanted")
        (folder / "consolidated.safetensors").write_bytes(b"not wanted")
    old = tmp_path / "hub" / "org" / "old"
    old.mkdir()
    torch.save(state(1), old / "pytorch_model.bin")
    handler = type("Here", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    handler.port = server.server_address[1]  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    server.server_close()


def polytask(hub: Any, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(folder / "home"), **environment}
    command = [sys.executable, "-m", "polytask", "merge", *map(str, arguments)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**kept, **environment})


def test_fetched_once_and_read_from_the_cache_from_then_on(hub: Any, tmp_path: Path) -> None:
    models = ("org/base", "org/cars", f"org/digits@{COMMIT}")
    done = polytask(hub, tmp_path, *models, "--method", "ties", "--out", "out")
    assert done.returncode == 0, done.stderr
    expected = merge(state(0), [state(1), state(2)], "ties")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["of"] == "base"
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["experts"] == list(models[1:])
    assert not [p for p in hub.asked if "onnx" in p.partition("resolve")[2] or "consolidated" in p]
    weights = [p for p in hub.asked if p.endswith("model.safetensors")]
    assert len(weights) == 3
    again = polytask(hub, tmp_path, *models, "--method", "ties", "--out", "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    planned = polytask(hub, tmp_path, *models, "--dry-run", HF_HUB_OFFLINE="1")
    assert planned.returncode == 0, planned.stderr
    assert [p for p in hub.asked if p.endswith("model.safetensors")] == weights


def test_a_plan_fetches_headers_alone(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text(
        "merge_method: linear\nmodels: [{model: org/cars, parameters: {weight: 1}}, {model: org/digits, parameters: {weight: 3}}]"
    )
    done = polytask(hub, tmp_path, "merge.yml", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [m["path"] for m in told["models"]] == ["org/cars", "org/digits"]
    assert (told["merged"], told["bytes"]) == (2, 4 * (40 * 6 + 40))
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    done = polytask(hub, tmp_path, "merge.yml", "out")
    assert done.returncode == 0, done.stderr
    expected = merge(None, [state(1), state(2)], "weighted", weights=[1, 3])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[n], v) for n, v in expected.items())


def test_inputs_go_by_the_name_on_the_hub(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Linear(6, 40))\n")
    (tmp_path / "data").mkdir()
    for name in MODELS[1:]:
        np.savez(tmp_path / "data" / f"{name}.npz", inputs=np.random.default_rng(0).normal(size=(9, 6)).astype("f4"))
    models = ("org/base", "org/cars@main", "org/digits")
    done = polytask(
        hub, tmp_path, *models, "--method", "esm", "--proxy", "data", "--model", "net.py:net", "--out", "out"
    )
    assert done.returncode == 0, done.stderr
    whose = polytask(hub, tmp_path, *models, "--method", "emr", "--set", "expert=digits", "--out", "whose")
    assert whose.returncode == 0, whose.stderr
    assert json.loads((tmp_path / "whose" / "config.json").read_text())["of"] == "digits"
    snapshot = tmp_path / "home" / "hub" / "models--org--digits" / "snapshots" / COMMIT
    assert expert_name(snapshot) == "digits"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/boats", "there is no model at org/boats, neither on this disk nor on the hub"),
        ("org/cars@next", "the hub has no revision next of org/cars"),
        ("org/gated", "the hub keeps org/gated behind a licence"),
        ("org/old+org/cars", "org/cars is no adapter"),
    ],
)
def test_what_the_hub_has_not(hub: Any, tmp_path: Path, model: str, said: str) -> None:
    done = polytask(hub, tmp_path, "org/base", model, "--out", "out")
    assert (done.returncode in (2, 5), said in done.stderr) == (True, True), done.stderr
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_older_formats_and_no_connection(hub: Any, tmp_path: Path) -> None:
    done = polytask(hub, tmp_path, "org/base", "org/old", "--set", "scale=1.0", "--out", "out")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[n], v, atol=1e-6) for n, v in state(1).items())
    done = polytask(hub, tmp_path, "org/base", "org/cars", "--out", "more", HF_HUB_OFFLINE="1")
    assert (done.returncode, "there is no model at org/cars on this disk, and the hub" in done.stderr) == (5, True)

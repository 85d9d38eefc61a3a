"""CONTRIBUTING's "add a method in one file", followed literally in a package outside the library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import blocks

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def with_package(tmp_path: Path, root: Path) -> Run:
    """Run Python where the guide's package is installed: its module, and the entry points its pyproject.toml declares."""
    (tmp_path / "inverse_norm.py").write_text(blocks("CONTRIBUTING.md", "python")["inverse_norm.py"], encoding="utf-8")
    declared = tomllib.loads(blocks("CONTRIBUTING.md", "toml")["pyproject.toml"])["project"]["entry-points"]
    installed = tmp_path / "inverse_norm-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: inverse-norm\nVersion: 0.1\n", encoding="utf-8")
    lines = [
        line
        for group, entries in declared.items()
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()))
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=root, env=environment, check=False
        )

    return run


def test_the_guide_s_method_is_listed(with_package: Run) -> None:
    done = with_package("-m", "polytask", "methods", "--json")
    assert done.returncode == 0, done.stderr
    listed = {m["name"]: m for m in json.loads(done.stdout)}
    assert listed["inverse_norm"]["needs"] == "gramian"
    assert listed["inverse_norm"]["summary"] == "Give every task a gradient of the same length."


def test_the_guide_s_method_computes_what_its_formula_says(with_package: Run) -> None:
    program = "import torch, polytask.balancing as b; print(b.make('inverse_norm').direction(torch.tensor([[3., 4.], [0., 2.]])).tolist())"
    done = with_package("-c", program)
    assert json.loads(done.stdout) == pytest.approx([0.6, 1.8])


def test_the_guide_s_method_passes_the_generated_property_tests(with_package: Run) -> None:
    generated = "tests/balancing/test_every_method.py"
    done = with_package(
        "-m", "pytest", generated, "-q", "-k", "inverse_norm", "-p", "no:xdist", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) >= 15


def test_the_registry_is_untouched_without_the_package() -> None:
    from polytask import registry

    assert "inverse_norm" not in {m.name for m in registry.methods()}

"""Nothing heavy is loaded before it is needed: asserted on what was imported, never on the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polytask import registry

HEAVY = {"torch", "pandas", "sklearn", "skrub", "numpy", "scipy", "matplotlib", "accelerate", "pyarrow", "torchmetrics"}
PROBE = """
import contextlib, io, json, sys
{action}
json.dump(sorted(sys.modules), sys.stdout)
"""
COMMAND = """
from polytask.cli import main
sys.argv = {argv!r}
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""


def modules(action: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(action=action)], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def loaded(action: str) -> set[str]:
    return {name.partition(".")[0] for name in modules(action)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["fit", "--help"],
        ["verify", "--help"],
        ["bench", "steps", "--help"],
        ["bench", "methods", "--help"],
        ["--show-completion", "bash"],
    ],
)
def test_answers_without_loading_torch_or_tables(arguments: list[str]) -> None:
    found = loaded(COMMAND.format(argv=["polytask", *arguments]))
    assert "typer" in found
    assert not found & HEAVY


def test_importing_polytask_loads_nothing_but_itself() -> None:
    found = loaded("import polytask")
    assert "polytask" in found
    assert not found & (HEAVY | {"typer", "rich"})


def test_listing_methods_loads_no_table_library() -> None:
    found = loaded(COMMAND.format(argv=["polytask", "methods"]))
    assert "torch" in found
    assert not found & {"pandas", "sklearn", "skrub", "matplotlib", "accelerate", "torchmetrics"}


@pytest.mark.parametrize("method", ["average", "dare_ties", "tsv_m"])
def test_a_plan_of_a_merge_loads_its_method_and_no_other_room(method: str, tmp_path: Path) -> None:
    for name in ("base", "one", "two"):
        save_file({"w": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "one", "two")]
    found = modules(COMMAND.format(argv=["polytask", "merge", *models, "--method", method, "--dry-run"]))
    assert f"polytask.merging.{method}" in found
    assert not {name.partition(".")[0] for name in found} & (HEAVY - {"torch", "numpy"} | {"transformers", "peft"})
    rooms = {name.split(".")[1] for name in found if name.startswith("polytask.")}
    assert rooms <= {"cli", "commands", "errors", "merging", "registry"}
    # of the other methods' files only those that this one is made of
    methods = {f"polytask.merging.{m.name}" for m in registry.methods("merging")}
    assert len(found & methods) <= 4


def test_a_method_is_found_in_the_file_of_its_name_alone() -> None:
    found = modules("from polytask import registry; assert registry.find('Nash-MTL', 'balancing') is not None")
    assert "polytask.balancing.nash_mtl" in found
    assert "polytask.merging" not in found
    found = modules("from polytask import registry; assert registry.find('ties', 'merging') is not None")
    assert "polytask.balancing" not in found
    assert "polytask.merging.karcher" not in found

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
from polytask.merging import Merger

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


METHODS = sorted(m.name for m in registry.methods("merging"))
TENSOR_BY_TENSOR = [n for n in METHODS if issubclass(registry.find(n, "merging").factory, Merger)]  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "one", "two"):
        save_file({"w": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    save_file({"inputs": torch.ones(9, 2)}, tmp_path / "proxy.safetensors")
    (tmp_path / "merge.yml").write_text(
        "merge_method: ties\nbase_model: base.safetensors\nmodels:\n"
        "  - {model: one.safetensors, parameters: {weight: 1.0}}\n  - {model: two.safetensors, parameters: {weight: 0.5}}\n"
    )
    return tmp_path


def plan_of(folder: Path, *arguments: str) -> set[str]:
    argv = ["polytask", "merge", *arguments, "--dry-run"]
    action = f"import os\nos.chdir({str(folder)!r})\n" + COMMAND.format(argv=argv)
    return modules(action)


def check_light(found: set[str]) -> None:
    # an import of PyTorch that waits has its name there, but nothing of it
    assert not {name.partition(".")[0] for name in found} & (HEAVY - {"torch", "numpy"} | {"transformers", "peft"})
    assert not [name for name in found if name.startswith("torch.")]
    rooms = {name.split(".")[1] for name in found if name.startswith("polytask.")}
    assert rooms <= {"cli", "commands", "errors", "merging", "registry"}


@pytest.mark.parametrize("method", TENSOR_BY_TENSOR)
def test_a_plan_of_a_merge_loads_its_method_and_not_pytorch(method: str, folder: Path) -> None:
    models = ["base.safetensors", "one.safetensors", "two.safetensors"]
    proxy = ["--proxy", "proxy.safetensors"] if registry.find(method).needs == "statistics" else []
    whose = ["--set", "expert=two"] if method in ("emr", "tall", "bitdelta", "randes") else []
    found = plan_of(folder, *models, "--method", method, *proxy, *whose)
    assert f"polytask.merging.{method}" in found
    check_light(found)
    # of the other methods' files only those that this one is made of
    assert len(found & {f"polytask.merging.{m}" for m in METHODS}) <= 4


def test_a_plan_from_a_file_loads_no_pytorch_either(folder: Path) -> None:
    check_light(plan_of(folder, "merge.yml"))


def test_a_package_that_waits_is_itself_when_it_is_used() -> None:
    action = """
from polytask.commands.deferred import defer
defer("json"); defer("wave"); defer("xml"); defer("no_such_package")
import wave, xml
assert "no_such_package" not in sys.modules and "Deferred" in type(xml).__name__, type(xml)
from xml.dom import minidom
assert type(xml).__name__ == "module" and xml.dom.minidom is minidom and wave.Error.__name__ == "Error"
"""
    assert {"xml.dom.minidom", "wave"} <= modules(action)


def test_a_method_is_found_in_the_file_of_its_name_alone() -> None:
    found = modules("from polytask import registry; assert registry.find('Nash-MTL', 'balancing') is not None")
    assert "polytask.balancing.nash_mtl" in found
    assert "polytask.merging" not in found
    found = modules("from polytask import registry; assert registry.find('ties', 'merging') is not None")
    assert "polytask.balancing" not in found
    assert "polytask.merging.karcher" not in found

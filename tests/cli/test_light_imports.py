"""Nothing heavy is loaded before it is needed: asserted on what was imported, never on the clock."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "pandas", "sklearn", "skrub", "numpy", "scipy", "matplotlib", "accelerate", "pyarrow", "torchmetrics"}
PROBE = """
import contextlib, io, json, sys
{action}
json.dump(sorted({{name.partition(".")[0] for name in sys.modules}}), sys.stdout)
"""
COMMAND = """
from polytask.cli import main
sys.argv = {argv!r}
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""


def loaded(action: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(action=action)], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


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

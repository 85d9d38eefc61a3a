"""The command line as a user meets it: in this process for speed, as a real process where signals and disks are real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from polytask.cli import app


@pytest.fixture
def polytask() -> Callable[..., Result]:
    """Run ``polytask ARGUMENTS`` in this process; its stdout and stderr apart."""

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run

"""The command line as a user meets it: in this process for speed, as a real process where signals are real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from polytask.cli import app

SMALL = ("--seeds", "1", "--epochs", "2", "--trials", "1", "--balance", "mgda", "--no-grouping", "--workers", "1")


def make_table(rows: int = 240) -> pd.DataFrame:
    """Two related targets of two kinds, a third of the second one's labels missing, a group and a date."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, rows))
    bought = np.where(a - c + 0.5 * rng.normal(size=rows) > 0, "yes", "no").astype(object)
    bought[rng.random(rows) < 0.3] = None
    return pd.DataFrame(
        {
            "a": a,
            "b": b,
            "c": c,
            "colour": rng.choice(list("rgb"), rows),
            "shop": [f"shop {i % 24}" for i in range(rows)],
            "day": pd.date_range("2024-01-01", periods=rows),
            "size": a + 0.5 * b + 0.3 * rng.normal(size=rows),
            "bought": bought,
        }
    )


@pytest.fixture(scope="session")
def polytask() -> Callable[..., Result]:
    """Run ``polytask ARGUMENTS`` in this process; its stdout and stderr apart."""

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A small sound table as CSV."""
    path = tmp_path / "table.csv"
    make_table().to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, polytask: Callable[..., Result]) -> tuple[Path, Path, Result]:
    """A finished run on the small table: (run folder, table, what the command printed)."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "table.csv"
    make_table().to_csv(path, index=False)
    options = ("--ignore", "day", "--split-by", "shop", "--kind", "size=regression")
    result = polytask("fit", path, "-t", "size", "-t", "bought", "--out", folder / "run", *options, *SMALL)
    assert result.exit_code == 0, result.stderr
    return folder / "run", path, result

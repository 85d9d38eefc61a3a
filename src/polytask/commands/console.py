"""Where output goes: results on stdout, progress and errors on stderr, data as JSON when asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text; no progress.")]


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # a pipe or a file has no width of its own: tables keep the one they were designed for
    console.width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if console.is_terminal else WIDTH
    return console


def out() -> Console:
    """The console of results."""
    return _console(stderr=False)


def err() -> Console:
    """The console of progress and errors."""
    return _console(stderr=True)


def print_json(data: Any) -> None:
    """Print data for programs: one JSON document, indented, no other output around it."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def table(columns: Sequence[str | tuple[str, dict[str, Any]]], rows: Sequence[Sequence[str | Text]]) -> Table:
    """A plain table: a column is its heading, or (heading, rich's column options); strings are shown as they are, brackets included."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        heading, options = (column, {}) if isinstance(column, str) else column
        made.add_column(heading, **options)
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made

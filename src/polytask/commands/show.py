"""``polytask report`` and ``explain``: read a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from polytask.commands.console import AsJson, out, print_json

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]


def report(
    folder: RunFolder,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Where to write the page; RUN/report.html when omitted.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild a run's report.html from its results.json and print the verdict."""
    from polytask.report import verdict_table, write_html

    results = read_results(folder)
    page = to or folder / "report.html"
    write_html(results, page)
    if as_json:
        print_json(results)
        return
    console = out()
    console.print(verdict_table(results))
    console.print(f"Report: {page}", markup=False, soft_wrap=True)


def explain(folder: RunFolder, as_json: AsJson = False) -> None:
    """Say which tasks disturb each other: gradient conflicts against the null of mini-batches within one task."""
    from polytask.report import explain as diagnosis

    results = read_results(folder)
    if as_json:
        print_json(results.get("interference"))
        return
    out().print(diagnosis(results))


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
        InputError: there is no run, or it has not finished.
        StorageError: its results.json is damaged.
    """
    from polytask.errors import InputError, StorageError

    path = folder / "results.json"
    if not path.is_file():
        known = folder.is_dir() and (folder / "config.yaml").is_file()
        raise InputError(
            f"the run in {folder} has not finished: go on with  polytask fit ... --resume"
            if known
            else f"{folder} is not the folder of a run: it has no results.json"
        )
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    return results

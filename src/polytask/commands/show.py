"""``polytask report`` and ``explain``: read a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from polytask.commands.console import AsJson, out, print_json

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]
CURVES = ("history", "interference")
"""Parts of results.json that are left to the file: long, and of no use in a terminal."""


def report(
    folder: RunFolder,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="FILE", help="Where to write the page; RUN/report.html when omitted.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild the report of a run from its results.json, and print the verdict."""
    from polytask.report import write_html
    from polytask.training.run_folder import read_results

    results = read_results(folder)
    page = write_html(results, to or folder / "report.html")
    show_results(results, as_json)
    if not as_json:
        out().print(f"Report: {page}", markup=False, soft_wrap=True)


def explain(folder: RunFolder, as_json: AsJson = False) -> None:
    """Say which tasks disturb each other: gradient conflicts against the null of mini-batches within one task."""
    from polytask.report import explain as diagnosis
    from polytask.training.run_folder import read_results

    results = read_results(folder)
    if as_json:
        print_json(results.get("interference"))
    else:
        out().print(diagnosis(results))


def show_results(results: Mapping[str, Any], as_json: bool) -> None:
    """The verdict and both tables, or results.json without its curves."""
    from polytask.report import methods_table, verdict_table

    if as_json:
        print_json({part: found for part, found in results.items() if part not in CURVES})
        return
    out().print(verdict_table(results), methods_table(results), sep="\n")

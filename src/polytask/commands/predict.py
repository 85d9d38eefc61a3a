"""``polytask predict``: put a finished run's model to work on new rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polytask.commands.console import out
from polytask.commands.show import RunFolder


def predict(
    folder: RunFolder,
    data: Annotated[
        Path, typer.Argument(help="Rows to predict: CSV, Parquet or Feather, also gzipped.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write: .csv, .parquet or .feather; CSV on stdout when omitted.", show_default=False
        ),
    ] = None,
    intervals: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Add prediction intervals of this coverage to regression targets.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write predictions, class probabilities and, when asked, intervals for every target."""
    from polytask.data import read_table
    from polytask.training import study

    predicted = study.predict(folder, read_table(data), intervals=intervals)
    if to is None:
        typer.echo(predicted.to_csv(index=False), nl=False)
        return
    write_table(predicted, to)
    out().print(f"{len(predicted)} rows of predictions: {to}", markup=False, soft_wrap=True)

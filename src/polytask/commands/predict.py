"""``polytask predict``: put a finished run's model to work on new rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polytask.commands.console import err
from polytask.commands.show import RunFolder
from polytask.commands.tables import Columns, Data, Encoding, read, write


def predict(
    folder: RunFolder,
    data: Data,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to write: .csv, .parquet or .feather; CSV on stdout when omitted.",
            show_default=False,
        ),
    ] = None,
    intervals: Annotated[
        float | None,
        typer.Option(
            metavar="COVERAGE",
            help="Add intervals of this coverage, such as 0.9, to numeric targets.",
            show_default=False,
        ),
    ] = None,
    columns: Columns = None,
    encoding: Encoding = "utf-8",
) -> None:
    """Write predictions, class probabilities and, when asked, intervals of every target for new rows."""
    from polytask.training.prediction import Predictor

    predicted = Predictor(folder).predict(read(data, columns, encoding), intervals)
    if to is None:
        typer.echo(predicted.to_csv(index=False), nl=False)
        return
    write(predicted, to)
    err().print(f"{len(predicted)} rows of predictions: {to}", markup=False, soft_wrap=True)

"""Tables on the command line: the options that say how to read one, and writing one whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="A table: CSV, Parquet or Feather, also gzipped.", show_default=False)
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Names of the columns, between commas, for a text file without a header.",
        show_default=False,
    ),
]
Encoding = Annotated[str, typer.Option(metavar="NAME", help="Of a text file.")]


def read(path: Path, columns: str | None, encoding: str) -> pd.DataFrame:
    """The table in a file."""
    from polytask.data import read_table

    return read_table(
        path, columns=None if columns is None else [c.strip() for c in columns.split(",")], encoding=encoding
    )


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a table in the form its suffix names.

    Raises:
        InputError: a suffix that names none.
        StorageError: it cannot be written; what was at the path is left as it was.
    """
    from polytask.errors import InputError, StorageError

    form = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    beside = path.with_name(f".part-{path.name}")  # the suffix decides about compression: it stays
    if form not in ("csv", "parquet", "feather") or (form != "csv" and path.suffix.lower() == ".gz"):
        raise InputError(
            f"{path.name} has no suffix of a table that can be written: .csv, .csv.gz, .parquet or .feather"
        )
    try:
        if form == "csv":
            frame.to_csv(beside, index=False)
        elif form == "parquet":
            frame.to_parquet(beside, index=False)
        else:
            frame.reset_index(drop=True).to_feather(beside)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from error

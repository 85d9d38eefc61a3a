"""The options of ``polytask fit`` and ``demo``: what each is called, takes and says in the help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(*names: str, says: str, takes: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, metavar=takes, help=says, show_default=False, **more)


Targets = Annotated[
    list[str] | None, _option("--target", "-t", takes="NAME", says="A column to predict; give it several times.")
]
Kinds = Annotated[
    list[str] | None,
    _option("--kind", takes="NAME=KIND", says="A kind that is not to be inferred, e.g. grade=ordinal."),
]
Folder = Annotated[Path | None, _option("--out", takes="DIR", says="The run folder; polytask-DATA when omitted.")]
DemoFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The run folder.")]
Ignore = Annotated[
    list[str] | None, _option("--ignore", takes="COLUMN", says="A column that is neither feature nor target.")
]
SplitBy = Annotated[
    str | None, _option("--split-by", takes="COLUMN", says="Keep the rows of each group of this column together.")
]
SplitByTime = Annotated[
    str | None, _option("--split-by-time", takes="COLUMN", says="Test on the latest rows by this column.")
]
Balance = Annotated[
    list[str] | None,
    _option(
        "--balance",
        takes="METHOD",
        says="Balancing methods to compare (`polytask methods`); when omitted a few are picked, with reasons.",
    ),
]
Seeds = Annotated[
    int | None, _option("--seeds", min=1, takes="N", says="Seeds each method gets: 3, or 2 with --quick.")
]
Epochs = Annotated[
    int | None, _option("--epochs", min=1, takes="N", says="Passes over the rows at most: 40, or 15 with --quick.")
]
Trials = Annotated[
    int | None, _option("--trials", min=1, takes="N", says="Weightings tried for the tuned sum: 5, or 3 with --quick.")
]
NoGrouping = Annotated[
    bool, _option("--no-grouping", says="Look for no groups of tasks where learning all together hurts.")
]
Quick = Annotated[bool, _option("--quick", says="A first look: fewer seeds, epochs, trials and methods.")]
Workers = Annotated[
    int | None, _option("--workers", min=1, takes="N", says="Trainings at a time; results do not depend on it.")
]
Config = Annotated[
    Path | None,
    _option("--config", takes="FILE", says="Replay the run of this config.yaml on the same table, exactly."),
]
Resume = Annotated[bool, _option("--resume", says="Go on with the interrupted or killed run in the folder.")]
Overwrite = Annotated[bool, _option("--overwrite", says="Replace the run that the folder holds.")]

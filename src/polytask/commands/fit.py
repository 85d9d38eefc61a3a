"""``polytask demo`` and ``polytask fit``: from a table with several targets to a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from polytask.commands.console import AsJson, err, out
from polytask.commands.failures import Interrupted
from polytask.commands.progress import StudyView, watched
from polytask.commands.show import show_results
from polytask.commands.tables import Columns, Data, Encoding, read

if TYPE_CHECKING:
    import pandas as pd

    from polytask.training import Study

Balance = Annotated[
    list[str],
    typer.Option(
        metavar="METHOD",
        help="Balancing methods to compare, as `polytask methods` lists them; `auto` picks a few and says why.",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Seeds each method gets: 3, or 2 with --quick.", show_default=False),
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Passes over the rows at most: 40, or 15 with --quick.", show_default=False),
]
Trials = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Weightings tried for the tuned sum: 6, or 3 with --quick.", show_default=False
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="A first look: fewer seeds, epochs, trials and methods.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Trainings at a time; results do not depend on it.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted or killed run in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]


def demo(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run folder.")] = Path("polytask-demo"),
    quick: Quick = False,
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """See it work on real data that needs no network: a health insurance experiment with four targets."""
    from polytask.data import demo_table

    table = demo_table()
    if not as_json:
        err().print(Text.assemble((table.title, "bold"), "\n", table.text))
    options = {"kinds": table.kinds, "by": table.groups, "source": table.title, "quick": quick, "resume": resume}
    conduct(table.frame, table.targets, folder, as_json, workers=workers, overwrite=overwrite, **options)


def fit(
    data: Data,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", metavar="NAME", help="A column to predict; give it several times.", show_default=False
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The run folder; polytask-DATA when omitted.", show_default=False),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KIND",
            help="NAME=KIND where a kind is not to be inferred, e.g. grade=ordinal.",
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A column that is neither feature nor target.", show_default=False),
    ] = None,
    split_by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Keep the rows of each group of this column together.", show_default=False),
    ] = None,
    split_by_time: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Test on the latest rows by this column.", show_default=False)
    ] = None,
    balance: Balance = ["auto"],  # noqa: B006
    seeds: Seeds = None,
    epochs: Epochs = None,
    trials: Trials = None,
    grouping: Annotated[bool, typer.Option(help="Look for groups of tasks where learning all together hurts.")] = True,
    quick: Quick = False,
    columns: Columns = None,
    encoding: Encoding = "utf-8",
    workers: Workers = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Replay the run of this config.yaml on the same table, exactly.", show_default=False
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Should these targets be learnt together, and how? Train, compare, judge, and keep the best model."""
    from polytask.errors import InputError

    run = folder or Path(f"polytask-{data.name.partition('.')[0]}")
    common = {"workers": workers, "overwrite": overwrite}
    if config is not None:
        if target or kind or resume:
            raise InputError(
                "--config brings the targets and kinds of the run with it and starts anew: leave out --target, --kind and --resume"
            )
        conduct(read(data, columns, encoding), config, run, as_json, **common)
        return
    if not target:
        raise InputError(f"no target was named: say which columns of {data.name} to predict, each with --target NAME")
    kinds = dict(_told(k) for k in kind or ())
    study = {
        "by": split_by,
        "by_time": split_by_time,
        "ignore": ignore or (),
        "balance": balance,
        "grouping": grouping,
        "quick": quick,
    }
    budget = {"seeds": seeds, "epochs": epochs, "trials": trials, "resume": resume, "source": data.name}
    conduct(read(data, columns, encoding), target, run, as_json, kinds=kinds, **study, **budget, **common)


def _told(option: str) -> tuple[str, str]:
    from polytask.errors import InputError

    name, sign, kind = option.rpartition("=")
    if not sign or not name:
        raise InputError(f"--kind takes NAME=KIND, such as grade=ordinal, not {option!r}")
    return name, kind


def conduct(frame: pd.DataFrame, what: Sequence[str] | Path, folder: Path, as_json: bool, **options: Any) -> None:
    """Run a study (``what``: its targets) or replay one (``what``: its config), write its report, show its verdict."""
    from polytask.report import write_html
    from polytask.training.study import replay, run_study

    with watched(quiet=as_json, targets=() if isinstance(what, Path) else what) as view:

        def go() -> Study:
            if isinstance(what, Path):
                return replay(what, frame, out=folder, progress=view.tell, **options)
            return run_study(frame, what, out=folder, progress=view.tell, **options)

        study = _resumable(go, folder, view)
        page = write_html(study.results, folder / "report.html")
    show_results(study.results, as_json)
    if not as_json:
        out().print(f"Report: {page}", markup=False, soft_wrap=True)


def _resumable(go: Callable[[], Study], folder: Path, view: StudyView) -> Study:
    try:
        return go()
    except KeyboardInterrupt:
        state = view.state
        if state is None:
            raise Interrupted("interrupted before the first training: nothing was learnt yet") from None
        done = f"{state.done} of {state.total} trainings finished in {state.seconds:.0f} s"
        raise Interrupted(
            f"interrupted with {done}; they are kept in {folder}: the same command with --resume goes on"
        ) from None

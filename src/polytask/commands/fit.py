"""``polytask demo`` and ``polytask fit``: from a table with several targets to a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from polytask.commands.console import AsJson, err, out
from polytask.commands.failures import Interrupted
from polytask.commands.progress import StudyView, watched
from polytask.commands.show import show_results
from polytask.commands.study_options import (
    Balance,
    Config,
    DemoFolder,
    Epochs,
    Folder,
    Ignore,
    Kinds,
    NoGrouping,
    Overwrite,
    Quick,
    Resume,
    Seeds,
    SplitBy,
    SplitByTime,
    Targets,
    Trials,
    Workers,
)
from polytask.commands.tables import Columns, Data, Encoding, read

if TYPE_CHECKING:
    import pandas as pd

    from polytask.training import Study


def demo(
    folder: DemoFolder = Path("polytask-demo"),
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
    target: Targets = None,
    folder: Folder = None,
    kind: Kinds = None,
    ignore: Ignore = None,
    split_by: SplitBy = None,
    split_by_time: SplitByTime = None,
    balance: Balance = None,
    seeds: Seeds = None,
    epochs: Epochs = None,
    trials: Trials = None,
    no_grouping: NoGrouping = False,
    quick: Quick = False,
    columns: Columns = None,
    encoding: Encoding = "utf-8",
    workers: Workers = None,
    config: Config = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Should these targets be learnt together, and how? Train, compare, judge, and keep the best model."""
    from polytask.errors import InputError

    run = folder or Path(f"polytask-{data.name.partition('.')[0]}")
    common = {"workers": workers, "overwrite": overwrite}
    split = {"by": split_by, "by_time": split_by_time, "ignore": ignore or ()}
    budget = {"balance": balance or "auto", "seeds": seeds, "epochs": epochs, "trials": trials, "quick": quick}
    if config is not None:
        if any(
            (target, kind, ignore, split_by, split_by_time, balance, seeds, epochs, trials, no_grouping, quick, resume)
        ):
            raise InputError(
                f"--config repeats the run of {config} as it was: no option that says what is learnt, or how, goes with it"
            )
        conduct(read(data, columns, encoding), config, run, as_json, **common)
        return
    if not target:
        raise InputError(f"no target was named: say which columns of {data.name} to predict, each with --target NAME")
    about = {
        "kinds": dict(told(k) for k in kind or ()),
        "grouping": not no_grouping,
        "resume": resume,
        "source": data.name,
    }
    conduct(read(data, columns, encoding), target, run, as_json, **about, **split, **budget, **common)


def told(option: str) -> tuple[str, str]:
    """Read ``NAME=KIND``."""
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

"""``polytask bench``: what the methods cost a step, and what they are worth on real data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from polytask.commands.console import AsJson, err, out, print_json
from polytask.commands.failures import Interrupted
from polytask.commands.progress import watched
from polytask.commands.study_options import Ignore, Kinds, Overwrite, Resume, SplitBy, SplitByTime, Workers
from polytask.commands.tables import Columns, Encoding, read

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure the balancing methods: what a step costs, and what they are worth on your data.",
)

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        "--method",
        metavar="NAME",
        help="Methods to measure, several times or between commas; all that can run when omitted.",
        show_default=False,
    ),
]


@bench.command()
def steps(
    methods: Methods = None,
    tasks: Annotated[list[int], typer.Option(metavar="K", help="Numbers of tasks.")] = [3, 10, 40],  # noqa: B006
    trunk: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="mlp, conv, transformer, or wide: parameters outweigh activations."),
    ] = ["mlp", "conv", "transformer"],  # noqa: B006
    level: Annotated[
        list[str],
        typer.Option(
            metavar="LEVEL",
            help="Where gradients are taken: auto, representation (one pass) or exact (K passes).",
        ),
    ] = ["auto"],  # noqa: B006
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.py", help="Other libraries' steps to measure in the same rounds.", show_default=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds of timing; the median counts.")] = 9,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peaks too, each in a process of its own.")
    ] = True,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where steps.json and steps.md go, row by row.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time and peak memory of one training step, as ratios to a plain sum-of-losses step of the same model.

    Each method and the plain step take turns within each round, on one thread; the median over rounds is shown with its quartiles. With
    --out, rows are written as they come, and the same command goes on where an earlier one was stopped.
    """
    from polytask.benchmark import bench_steps
    from polytask.errors import InputError
    from polytask.report import steps_markdown, steps_table
    from polytask.training.run_folder import write_text

    wrong = next((x for x in level if x not in ("auto", "representation", "exact")), None)
    if wrong is not None:
        raise InputError(f"--level is auto, representation or exact, not {wrong!r}")
    started = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            started = json.loads((folder / "steps.json").read_text(encoding="utf-8"))

    def keep(results: dict[str, Any]) -> None:
        if folder is not None:
            write_text(folder / "steps.json", json.dumps(results, indent=1) + "\n")

    with _bar(quiet=as_json) as progress:
        results = bench_steps(
            _names(methods),
            tasks=tasks,
            trunks=trunk,
            levels=level,  # type: ignore[arg-type]
            beside=beside or (),
            rounds=rounds,
            memory=memory,
            progress=progress,
            started=started,
            keep=keep,
        )
    keep(results)
    if folder is not None:
        write_text(folder / "steps.md", steps_markdown(results))
    if as_json:
        print_json(results)
        return
    out().print(steps_table(results))
    if folder is not None:
        out().print(f"Figures: {folder}", markup=False, soft_wrap=True)


@bench.command(name="methods")
def quality(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A table (CSV, Parquet or Feather), or a folder of images as MNIST's, which are overlaid in pairs.",
            show_default=False,
        ),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            "--target",
            "-t",
            metavar="NAME",
            help="A column of the table to predict; several times.",
            show_default=False,
        ),
    ] = None,
    methods: Methods = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="The run folder; polytask-bench-DATA when omitted.", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Seeds of every row.")] = 5,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Passes over the rows at most: 25, or 8 of images.", show_default=False),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of every row: weights of the tuned sum, learning rates else.")
    ] = 3,
    rows: Annotated[int, typer.Option(min=10, metavar="N", help="How many pairs of images.")] = 10_000,
    right: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Other images for the lower right corner of pairs.", show_default=False),
    ] = None,
    kind: Kinds = None,
    ignore: Ignore = None,
    split_by: SplitBy = None,
    split_by_time: SplitByTime = None,
    columns: Columns = None,
    encoding: Encoding = "utf-8",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quality of every method on real data under one budget, beside single-task, equal and tuned weights.

    Every row has the same number of trials and seeds; everything is chosen on validation rows.
    """
    from polytask.data.idx import is_image_folder
    from polytask.errors import InputError
    from polytask.training.method_bench import bench_pairs, bench_table

    run = folder or Path(f"polytask-bench-{data.name.partition('.')[0]}")
    budget: dict[str, Any] = {"names": _names(methods), "seeds": seeds, "epochs": epochs, "trials": trials}
    budget |= {"workers": workers, "resume": resume, "overwrite": overwrite}
    images = is_image_folder(data)
    if images and (target or kind or ignore or split_by or split_by_time or columns):
        raise InputError(
            f"{data} holds images, whose two tasks are the left and the right one: no option of tables goes with it"
        )
    if not images and data.is_dir():
        raise InputError(f"the folder {data} holds no images-idx3-ubyte files, the format of MNIST")
    if not images and right is not None:
        raise InputError(f"--right is for pairs of images, and {data.name} is no folder of images")
    if not images and not target:
        raise InputError(f"no target was named: say which columns of {data.name} to predict, each with --target NAME")
    names = ("left", "right") if images else tuple(target or ())
    with watched(quiet=as_json, targets=names) as view, _kept(run):
        if images:
            results = bench_pairs(data, right=right, rows=rows, out=run, progress=view.tell, **budget)
        else:
            from polytask.commands.fit import told

            results = bench_table(
                read(data, columns, encoding),
                names,
                out=run,
                kinds=dict(told(k) for k in kind or ()),
                ignore=ignore or (),
                by=split_by,
                by_time=split_by_time,
                source=data.name,
                progress=view.tell,
                **budget,
            )
    _show(results, run, as_json)


def _show(results: dict[str, Any], run: Path, as_json: bool) -> None:
    from polytask.report import contest_table, write_contest_html

    page = write_contest_html(results, run / "report.html")
    if as_json:
        print_json({part: found for part, found in results.items() if part not in ("history", "interference")})
        return
    out().print(contest_table(results))
    out().print(f"Report: {page}", markup=False, soft_wrap=True)


def _names(given: list[str] | None) -> list[str]:
    return [name.strip() for part in given or () for name in part.split(",") if name.strip()]


@contextlib.contextmanager
def _kept(run: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; finished trainings are kept in {run}: the same command with --resume goes on"
        ) from None


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = err()
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(line, description=text, completed=done, total=total)

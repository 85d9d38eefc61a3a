"""``polytask merge compare``: several ways of merging judged on real tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from polytask.commands.console import AsJson, err, out, print_json
from polytask.commands.failures import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable

    from polytask.training.merges import Standing


def compare(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yml", help="The base, the experts, their data, the methods.", show_default=False
        ),
    ],
    folder: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="The folder of the report; results are kept there.", show_default=False
        ),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "--method",
            metavar="NAME",
            help="In place of the file's, or of all there are; several times or between commas.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="What {seed} in the file's paths stands for, and random draws; several times or between commas.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge ways of merging on tasks, tuned on validation rows, beside the experts, the base and task arithmetic.

    Killed and started again, it goes on where it was.
    """
    from polytask.report import merges_table, write_merge_html
    from polytask.training.merges import compare as judge
    from polytask.training.merges import read_comparison

    said = read_comparison(config, methods=_parts(methods), seeds=_numbers(seeds))
    with _watched(quiet=as_json) as tell:
        try:
            results = judge(
                said.tasks,
                said.lineage,
                said.candidates,
                folder=folder,
                seeds=said.seeds,
                trials=said.trials,
                proxy_rows=said.proxy_rows,
                left_out=said.left_out,
                fingerprint=said.fingerprint,
                progress=tell,
            )
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is finished is kept in {folder}: the same command goes on") from None
    page = write_merge_html(results, folder / "report.html")
    if as_json:
        print_json(results)
        return
    out().print(merges_table(results))
    out().print(f"Report: {page}", markup=False, soft_wrap=True)


def _parts(given: list[str] | None) -> list[str] | None:
    """What was given several times, or between commas."""
    return [part.strip() for each in given or () for part in each.split(",") if part.strip()] or None


def _numbers(given: list[str] | None) -> list[int] | None:
    from polytask.errors import InputError

    parts = _parts(given)
    try:
        return None if parts is None else [int(part) for part in parts]
    except ValueError:
        raise InputError(f"--seeds takes whole numbers, such as 0,1,2, not {', '.join(parts or ())!r}") from None


@contextmanager
def _watched(quiet: bool) -> Iterator[Callable[[Standing], None] | None]:
    """A bar of the candidates done, with what is being tried, while somebody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = err()
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda s: bar.update(task, completed=s.done, total=s.total, description=f"{s.candidate}: {s.note}")


@cache
def command() -> Any:
    """The command as typer makes it."""
    app = typer.Typer(
        context_settings={"help_option_names": ["-h", "--help"]}, add_completion=False, rich_markup_mode="rich"
    )
    app.command(name="compare")(compare)
    return typer.main.get_command(app)


class WithCompare(TyperCommand):
    """A command that takes paths, and beneath it one called ``compare``: a model of that name is written ``./compare``."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args and args[0] == "compare":
            return command().make_context(f"{info_name} compare", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

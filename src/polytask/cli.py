"""The command line ``polytask``: one file a group of commands in ``polytask.commands``, joined here.

Nothing heavy is imported before a command needs it: ``polytask --help`` loads typer, rich and the error types.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from polytask import __version__
from polytask.commands import bench, catalogue, doctor, fit, merge, merge_compare, predict, published, show
from polytask.commands.failures import EXIT_CODES, OneSentence

app = typer.Typer(
    name="polytask",
    cls=OneSentence,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polytask {__version__}")
        raise typer.Exit


@app.callback()
def polytask(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Several targets, one model: train, balance and judge multi-task learning."""


BENEATH: dict[str, Any] = {
    "merge": {
        "cls": merge_compare.WithCompare,
        "epilog": "[bold]polytask merge compare CONFIG.yml --out DIR[/bold] judges ways of merging on your own tasks.",
    }
}
"""Commands that have another one beneath them."""

for panel, commands in {
    "Your table": (fit.demo, fit.fit, predict.predict, show.report, show.explain),
    "Your fine-tuned models": (merge.merge,),
    "The methods and their evidence": (catalogue.methods, published.recipes, published.run, published.verify),
    "The installation": (doctor.doctor,),
}.items():
    for command in commands:
        beneath = BENEATH.get(command.__name__, {})
        app.command(rich_help_panel=panel, **beneath)(command)
app.add_typer(bench.bench, rich_help_panel="The methods and their evidence")


def main() -> None:
    """The entry point of the console script."""
    app(prog_name="polytask")

"""``polytask recipes``, ``run`` and ``verify``: published systems and whether their claims hold here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from polytask.commands.console import AsJson, err, out, print_json, table

Seeds = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="How many seeds; the recipe's own number when omitted.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="Small settings: seconds, and nothing decided about the claim.")]


def recipes(
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="Only this domain.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List every recipe: a published system, its paper and its claim."""
    from polytask.errors import InputError
    from polytask.recipes import recipes as known

    found = known(domain)
    if domain is not None and not found:
        raise InputError(
            f"no recipe is of the domain {domain!r}; the domains are {', '.join(sorted({r.domain for r in known()}))}"
        )
    if as_json:
        keys = ("name", "domain", "paper", "summary", "claim", "reference", "seeds")
        print_json([{k: getattr(r, k) for k in keys} for r in found])
        return
    rows = [[r.name, r.domain, r.paper, r.claim] for r in found]
    out().print(table([("name", {"no_wrap": True}), "domain", ("paper", {"no_wrap": True}), "claim"], rows))


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `polytask recipes` lists it.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="A new folder for evidence.json, its page and figures.", show_default=False
        ),
    ],
    seeds: Seeds = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Run one recipe beside its baselines and judge its claim.

    The exit code is 0 when it ran, whether or not the claim held.
    """
    from polytask.recipes import run_recipe

    with _trials(quiet=as_json) as progress:
        evidence = run_recipe(name, seeds=seeds, quick=quick, out=folder, progress=progress)
    if as_json:
        print_json(evidence.to_json())
        return
    console = out()
    console.print(evidence.table())
    for check in evidence.checks:
        console.print(
            Text("✓ " if check["holds"] else "✗ ", style="green" if check["holds"] else "red").append(
                check["text"], style="default"
            )
        )
    hedge = " (a quick look decides nothing)" if evidence.quick else ""
    console.print(Text("The claim ").append(evidence.outcome, style="bold").append(f"{hedge}: {evidence.claim}"))
    console.print(f"Evidence: {folder}", markup=False, soft_wrap=True)


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Which recipes; all when omitted.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A new folder for the page of claims.", show_default=False),
    ] = None,
    seeds: Seeds = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Run recipes and say which claims hold; --json prints one line a recipe.

    The exit code is 0 whatever the outcomes, and 3 when a recipe did not run.
    """
    from polytask.errors import TrainingError
    from polytask.recipes import verify as verify_all

    with _trials(quiet=as_json) as progress:
        found = verify_all(names or (), seeds=seeds, quick=quick, out=folder, progress=progress)
    if as_json:
        for e in found:
            typer.echo(json.dumps({"outcome": e.outcome, **e.to_json()}, ensure_ascii=False))
    else:
        rows = [[e.recipe, e.outcome, e.paper, e.error or e.claim] for e in found]
        out().print(table([("recipe", {"no_wrap": True}), ("outcome", {"no_wrap": True}), "paper", "claim"], rows))
    broken = [e.recipe for e in found if e.error is not None]
    if broken:
        raise TrainingError(f"{len(broken)} of {len(found)} recipes did not run: {', '.join(broken)}")


@contextmanager
def _trials(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar of finished trials on stderr, where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = err()
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(line, description=text, completed=done, total=total)

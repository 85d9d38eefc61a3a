"""``polytask methods``: everything in the registry."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from polytask.commands.console import AsJson, out, print_json, table


def methods(
    family: Annotated[str | None, typer.Option(help="Only this family: balancing, optim, ...")] = None,
    as_json: AsJson = False,
) -> None:
    """List every registered method: family, what it needs of the engine, paper, one line."""
    from polytask import registry
    from polytask.errors import InputError

    found = list(registry.methods(family))
    if not found:
        families = sorted({m.family for m in registry.methods()})
        raise InputError(f"no registered method is of the family {family!r}; the families are {', '.join(families)}")
    if as_json:
        print_json([describe(m) for m in found])
        return
    rows = [[m.name, m.family, m.needs, m.paper, m.summary] for m in found]
    out().print(
        table(
            [
                ("name", {"no_wrap": True}),
                "family",
                "needs",
                ("paper", {"max_width": 24, "overflow": "fold"}),
                "what it does",
            ],
            rows,
        )
    )


def describe(method: Any) -> dict[str, Any]:
    """One registered method, JSON-ready; options without a default are listed with null, and why a property is not claimed by its name."""
    from inspect import Parameter

    return {
        "name": method.name,
        "family": method.family,
        "needs": method.needs,
        "paper": method.paper,
        "summary": method.summary,
        "aliases": list(method.aliases),
        "invariances": list(method.invariances),
        "exempt": dict(method.exempt),
        "options": {n: None if d is Parameter.empty else repr(d) for n, d in method.options.items()},
    }

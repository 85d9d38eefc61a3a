"""Running recipes by name, and the page of claims."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.errors import InputError, PolytaskError
from polytask.recipes.contract import Progress, empty_folder
from polytask.recipes.evidence import Evidence
from polytask.recipes.registration import find_recipe, recipes


def run_recipe(
    name: str,
    *,
    seeds: int | Sequence[int] | None = None,
    quick: bool = False,
    out: Path | str | None = None,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> Evidence:
    """Run one recipe by its name: see :meth:`Recipe.run`.

    Args:
        name: as ``polytask recipes`` lists it.
        seeds: how many, or which.
        quick: a look of seconds.
        out: a new or empty folder for the evidence.
        progress: told of every finished trial.
        options: the recipe's own settings, by name, where they shall differ from its defaults.

    Raises:
        InputError: no such recipe or option.
    """
    info = find_recipe(name)
    known = info.factory().options
    unknown = [o for o in options or {} if o not in known]
    if unknown:
        raise InputError(f"the recipe {info.name} has no option {unknown[0]!r}; it takes {', '.join(known) or 'none'}")
    return info.factory(**(options or {})).run(seeds, quick, out, progress)


def verify(
    names: Sequence[str] = (),
    *,
    seeds: int | Sequence[int] | None = None,
    quick: bool = False,
    out: Path | str | None = None,
    progress: Progress | None = None,
) -> list[Evidence]:
    """Run the recipes of these names (all when there are none) and write the page of claims, those that did not hold included.

    A recipe that cannot run here (a missing extra, say) becomes evidence that says so; the others go on.

    Args:
        names: which recipes.
        seeds: how many, or which; each recipe's own number when omitted.
        quick: a look of seconds at each.
        out: a new or empty folder: ``claims.md``, and a folder of evidence for each recipe.
        progress: told of every finished trial.

    Raises:
        InputError: an unknown name, before anything runs.
    """
    chosen = [find_recipe(name) for name in names] if names else recipes()
    folder = empty_folder(out)
    found = []
    for info in chosen:
        try:
            found.append(
                run_recipe(
                    info.name, seeds=seeds, quick=quick, out=folder / info.name if folder else None, progress=progress
                )
            )
        except PolytaskError as reason:
            found.append(
                Evidence(
                    info.name,
                    info.paper,
                    info.claim,
                    False,
                    [],
                    [],
                    info.reference,
                    info.domain,
                    quick,
                    error=str(reason),
                )
            )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / ".claims.md"
        beside.write_text(claims_page(found) + "\n", encoding="utf-8")
        os.replace(beside, folder / "claims.md")
    return found


def claims_page(evidence: Sequence[Evidence]) -> str:
    """The page of claims, as markdown: a table of outcomes, then the evidence of each recipe."""
    held = sum(e.holds for e in evidence)
    lines = [
        "# Claims",
        "",
        f"{held} of {len(evidence)} claims hold.",
        "",
        "| recipe | paper | outcome | claim |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| [{e.recipe}](#{e.recipe}) | {e.paper} | {e.outcome}{' (quick look)' if e.quick else ''} | {e.claim} |"
        for e in evidence
    ]
    for e in evidence:
        lines += ["", f'<a id="{e.recipe}"></a>', "", e.markdown(level=2, figures=f"{e.recipe}/")]
    return "\n".join(lines)

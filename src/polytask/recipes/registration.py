"""Which recipes there are: each registers itself where it is written, and is found without being listed anywhere."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform

from polytask.errors import InputError
from polytask.recipes.contract import Recipe, RecipeInfo
from polytask.registry import spelling

ENTRY_POINT_GROUP = "polytask.recipes"

R = TypeVar("R", bound=type[Recipe])


_recipes: dict[str, RecipeInfo] = {}


@dataclass_transform(frozen_default=True)
def recipe(
    name: str,
    *,
    domain: str,
    paper: str,
    claim: str,
    reference: str,
    seeds: int,
    quick: Mapping[str, Any],
) -> Callable[[R], R]:
    """Class decorator that makes a :class:`Recipe` a frozen dataclass of its options and enters it under its name.

    Raises:
        ValueError: the name is taken.
    """

    def enter(cls: R) -> R:
        made = cast(R, dataclass(frozen=True)(cls))
        if any(spelling(name) == spelling(other) for other in _recipes):
            raise ValueError(f"the recipe name {name!r} is already taken")
        made.info = _recipes[name] = RecipeInfo(name, domain, paper, claim, reference, seeds, made, dict(quick))
        return made

    return enter


@cache
def _discover() -> None:
    for path in sorted(Path(__file__).parent.glob("*/*.py")):
        if path.stem != "__init__":
            importlib.import_module(f"polytask.recipes.{path.parent.name}.{path.stem}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        entry.load()


def recipes(domain: str | None = None) -> list[RecipeInfo]:
    """Every recipe (of one domain), in alphabetical order: those of the library and those of the entry point group ``polytask.recipes``."""
    _discover()
    return [info for _, info in sorted(_recipes.items()) if domain in (None, info.domain)]


def find_recipe(name: str) -> RecipeInfo:
    """The recipe of a name, whatever its capitals, dashes and underscores.

    Raises:
        InputError: no such recipe; the message suggests the nearest names.
    """
    known = {spelling(info.name): info for info in recipes()}
    if spelling(name) in known:
        return known[spelling(name)]
    names = [info.name for info in known.values()]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    raise InputError(
        f"there is no recipe called {name!r}; "
        + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}")
    )

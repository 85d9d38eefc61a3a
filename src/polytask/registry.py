"""One registry for every named method: what it is called, what it needs, which paper it comes from.

A method registers itself where it is written; the command line, the documentation, the generated tests and the benchmarks
read the registry and nothing else. Packages outside polytask join through the entry point group ``polytask.methods``, each entry
naming a module whose import registers methods.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

from polytask.errors import InputError

ENTRY_POINT_GROUP = "polytask.methods"
FAMILIES = {
    "balancing": "polytask.balancing",
    "filter": "polytask.merging",
    "merging": "polytask.merging",
    "models": "polytask.models",
    "optim": "polytask.optim",
}
"""Where each family lives. Nothing of a package is imported before one of its methods is asked for."""

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Method:
    """What polytask knows of one registered method.

    Args:
        name: lower snake case, unique within the library.
        family: the room it lives in: ``balancing``, ``optim``, ...
        factory: the class that makes it.
        paper: where it was published, e.g. ``arXiv:2305.19000``.
        needs: the least it asks of the engine: ``losses``, ``gramian``, ``jacobian``, ``second evaluation``, ``optimizer``.
        aliases: the names that other libraries use.
        invariances: declared properties, each of which a generated test asserts (see ``tests/balancing``).
        exempt: generated tests that do not apply, each with the reason.
        example: options that make a small instance for generated tests where the defaults do not suffice.
    """

    name: str
    family: str
    factory: Callable[..., Any]
    paper: str
    needs: str
    aliases: tuple[str, ...] = ()
    invariances: tuple[str, ...] = ()
    exempt: dict[str, str] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Every constructor option with its default (``inspect.Parameter.empty`` where there is none), the base classes' included."""
        found: dict[str, Any] = {}
        for cls in inspect.getmro(self.factory) if isinstance(self.factory, type) else (self.factory,):
            if isinstance(cls, type) and "__init__" not in vars(cls):
                continue
            parameters = inspect.signature(vars(cls)["__init__"] if isinstance(cls, type) else cls).parameters.values()
            for p in parameters:
                if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                    found.setdefault(p.name, p.default)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):  # nothing is handed on to a base class
                break
        return found


_methods: dict[str, Method] = {}
_spellings: dict[str, str] = {}


def spelling(name: str) -> str:
    """Reduce a name to what LibMTL, TorchJD and the papers' scripts have in common: ``Nash_MTL`` -> ``nashmtl``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def register(
    name: str,
    *,
    family: str,
    paper: str,
    needs: str,
    aliases: tuple[str, ...] = (),
    invariances: tuple[str, ...] = (),
    exempt: dict[str, str] | None = None,
    example: dict[str, Any] | None = None,
) -> Callable[[C], C]:
    """Class decorator that enters a method into the registry.

    Raises:
        ValueError: the name or an alias is already taken by another method.
    """

    def enter(cls: C) -> C:
        method = Method(name, family, cls, paper, needs, aliases, invariances, exempt or {}, example or {})
        for label in (name, *aliases):
            owner = _spellings.setdefault(spelling(label), name)
            if owner != name:
                raise ValueError(f"the method name {label!r} of {name!r} is already taken by {owner!r}")
        _methods[name] = method
        cls.method = method  # type: ignore[attr-defined]
        return cls

    return enter


def _discover(family: str | None) -> None:
    for package in [FAMILIES[family]] if family in FAMILIES else dict.fromkeys(FAMILIES.values()):
        _import_all(package)
    _import_from_outside()


def _import_namesake(name: str, family: str) -> None:
    label, package = name.lower().replace("-", "_"), FAMILIES.get(family)
    if package is not None and label in _modules(package):
        importlib.import_module(f"{package}.{label}")


@cache
def _import_all(package: str) -> None:
    for module in _modules(package):
        importlib.import_module(f"{package}.{module}")


def _modules(package: str) -> list[str]:
    return [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]


@cache
def _import_from_outside() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever it is, it is not the fault of the methods that do load
            warnings.warn(
                f"the methods of {entry.value} (entry point {entry.name!r}) are left out, since it does not import: {error}",
                stacklevel=2,
            )


def methods(family: str | None = None) -> Iterator[Method]:
    """Every registered method (of one family), in alphabetical order."""
    _discover(family)
    yield from (m for _, m in sorted(_methods.items()) if family in (None, m.family))


def known(name: str, *families: str) -> Method | None:
    """The method registered under a name or an alias in one of some families (in any), None where there is none.

    One method is one file of its name: of a family's package nothing else is imported where that is so.
    """
    further: list[Callable[[], None]] = [lambda: None]
    further += [partial(_import_namesake, name, family) for family in families]
    further += [partial(_discover, family) for family in families or (None,)]
    for look in further:
        look()
        found = _methods.get(_spellings.get(spelling(name), ""))
        if found is not None and (not families or found.family in families):
            return found
    return None


def find(name: str, family: str | None = None) -> Method:
    """The method registered under a name or an alias, whatever its capitals, dashes and underscores.

    Raises:
        InputError: no such method; the message suggests the nearest names.
    """
    if not isinstance(name, str):
        raise InputError(f"a method is given by its name, not by {name!r}")
    found = known(name, *([family] if family is not None else []))
    if found is not None:
        return found
    choices = [m.name for m in methods(family)]
    near = difflib.get_close_matches(name.lower(), choices, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; known are {', '.join(choices)}"
    raise InputError(f"there is no {family or 'registered'} method called {name!r}{hint}")

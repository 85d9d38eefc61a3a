"""Packages that are loaded when they are first used, not when they are imported."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class Deferred(ModuleType):
    """A package that becomes itself when something of it is asked for.

    The standard library's lazy module does so at the import already: the import statement asks for ``__spec__``.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]  # modules may change their class
        vars(self).update(vars(module_from_spec(spec)))
        spec.loader.exec_module(self)
        return getattr(self, name)


def defer(name: str) -> None:
    """Let imports of a package cost nothing until something of it is used.

    A plan needs the classes in a method's file, which imports PyTorch for the day that it computes: a second or two, for nothing.

    Args:
        name: of a package or module; nothing happens where it is loaded already, or not installed.
    """
    spec = find_spec(name) if name not in sys.modules else None
    if spec is not None and spec.loader is not None:
        waiting = Deferred(
            name
        )  # without __path__: an import of a submodule asks for it, and so loads the package first
        waiting.__spec__ = spec
        sys.modules[name] = waiting

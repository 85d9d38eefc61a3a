"""``polytask demo`` and ``polytask fit``: from a table with several targets to a verdict."""

from __future__ import annotations


def demo() -> None:
    """x."""


def fit() -> None:
    """x."""

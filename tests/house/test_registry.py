"""The registry: names, spellings, and packages from outside."""

from __future__ import annotations

import importlib.metadata

import pytest

from polytask import registry
from polytask.errors import InputError


def test_names_are_found_whatever_their_spelling_and_near_misses_are_suggested():
    assert registry.find("Nash_MTL") is registry.find("nash-mtl") is registry.find("NashMTL")
    with pytest.raises(InputError, match=r"did you mean .*fairgrad"):
        registry.find("fairgrd")
    with pytest.raises(InputError, match="no merging method called 'mgda'"):
        registry.find("mgda", family="merging")


def test_two_methods_cannot_share_a_name():
    with pytest.raises(ValueError, match="'nash_mtl' of 'another' is already taken by 'nash_mtl'"):
        registry.register("another", family="balancing", paper="-", needs="losses", aliases=("nash_mtl",))(
            type("X", (), {})
        )


def test_a_package_from_outside_that_does_not_import_is_named_and_left_out(monkeypatch):
    broken = importlib.metadata.EntryPoint("broken", "no_such_package_of_methods", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken])
    registry._import_from_outside.cache_clear()
    with pytest.warns(UserWarning, match=r"no_such_package_of_methods .*'broken'.* left out"):
        names = [m.name for m in registry.methods("balancing")]
    assert "mgda" in names
    monkeypatch.undo()
    registry._import_from_outside.cache_clear()

from __future__ import annotations

import json

from polytask import registry


def test_methods_lists_the_whole_registry(polytask):
    result = polytask("methods", "--json")
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert [m["name"] for m in listed] == [m.name for m in registry.methods()]
    mgda = next(m for m in listed if m["name"] == "mgda")
    assert mgda["family"] == "balancing"
    assert mgda["needs"] == "gramian"
    assert mgda["paper"] == "arXiv:1810.04650"
    assert mgda["summary"].startswith("Take the shortest vector")
    for entry in listed:  # whoever tests a property by the list learns why it is not claimed
        assert entry["exempt"] == registry.find(entry["name"], entry["family"]).exempt


def test_the_table_names_every_method_within_a_hundred_columns(polytask):
    result = polytask("methods")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    shown = {line.split()[0] for line in result.stdout.splitlines() if line and not line.startswith(" ")}
    assert {m.name for m in registry.methods()} <= shown


def test_one_family_only(polytask):
    listed = json.loads(polytask("methods", "--family", "balancing", "--json").stdout)
    assert {m["family"] for m in listed} == {"balancing"}


def test_an_unknown_family_is_named_with_the_known_ones(polytask):
    result = polytask("methods", "--family", "gardening")
    assert result.exit_code == 2
    assert "'gardening'" in result.stderr
    assert "balancing" in result.stderr


def test_doctor_finds_this_installation_sound(polytask):
    result = polytask("doctor", "--json")
    findings = {f["what"]: f for f in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert findings["torch"]["state"] == "ok"
    assert findings["step"]["state"] == "ok"
    assert "balancing" in findings["methods"]["detail"]


def test_doctor_reports_a_method_package_that_cannot_be_imported(polytask, monkeypatch):
    def broken(family=None):
        raise ImportError("no module named 'lost'")

    monkeypatch.setattr(registry, "methods", broken)
    result = polytask("doctor", "--json")
    found = next(f for f in json.loads(result.stdout) if f["what"] == "methods")
    assert result.exit_code == 1
    assert found == {"what": "methods", "state": "broken", "detail": "ImportError: no module named 'lost'"}


def test_doctor_keeps_the_brackets_of_an_extra(polytask, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def without_tensorboard(name):
        if name == "tensorboard":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_tensorboard)
    result = polytask("doctor")
    assert result.exit_code == 0
    assert "polytask[tensorboard]" in result.stdout


def test_version(polytask):
    import polytask as package

    assert polytask("--version").stdout == f"polytask {package.__version__}\n"

"""What the documents of the house promise is there and works."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import polytask
from polytask import registry

from .conftest import blocks


@pytest.mark.parametrize("position", blocks("README.md", "python"))
def test_every_python_block_of_the_readme_runs(position: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(compile(blocks("README.md", "python")[position], f"README.md block {position}", "exec"), scope)
    claims = {name: value for name, value in scope.items() if not name.startswith("__")}
    assert claims, "an example leaves something behind that a reader can look at"


@pytest.mark.parametrize(
    "document",
    ["docs/migrate-from-libmtl.md", "docs/migrate-from-torchjd.md", "docs/merge-compare.md", "docs/merging.md"],
)
def test_the_python_blocks_of_a_guide_run_one_after_another(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    # methods that a guide adds as an example stay within it; all others must be there before
    assert list(registry.methods())
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_spellings", dict(registry._spellings))
    found = blocks(document, "python")
    assert found
    for position, code in found.items():
        exec(compile(code, f"{document} block {position}", "exec"), scope)


def test_ci_runs_the_tests_as_the_readme_says(root: Path) -> None:
    commands = "\n".join(blocks("README.md", "bash").values())
    found = re.search(r"python -m pytest[^\n]*", commands)
    assert found is not None
    assert found[0] in (root / ".ci/run").read_text(encoding="utf-8")


def test_every_direct_dependency_is_pinned_within_its_range(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        line
        for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    pins = {name.lower(): Version(version) for name, version in (line.split("==") for line in lines)}
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    needed = [Requirement(line) for line in (*project["dependencies"], *extras)]
    direct = [r for r in needed if r.name != "polytask"]
    assert len(direct) > 20
    for requirement in direct:
        assert requirement.name.lower() in pins, requirement.name
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement.name
        assert requirement.specifier, f"{requirement.name} has no lower bound"


def test_links_between_documents_lead_somewhere(root: Path) -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (root / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (root / target).exists(), f"{document} links to {target}"


def test_the_changelog_knows_this_version_or_what_is_coming(root: Path) -> None:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{polytask.__version__}]" in text or "## [Unreleased]" in text


@pytest.mark.parametrize(
    ("script", "document"),
    [("guide", "which-method.md"), ("merge_guide", "merging.md"), ("merge_guide", "merge-compare.md")],
)
def test_the_tables_of_a_guide_are_those_of_the_kept_results(script: str, document: str, root: Path) -> None:
    spec = importlib.util.spec_from_file_location(script, root / "benchmarks" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    guide = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guide)
    text = (root / "docs" / document).read_text(encoding="utf-8")
    assert text.count("<!-- table ") > 0
    assert guide.written(text) == text

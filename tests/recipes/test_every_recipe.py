"""What every registered recipe must do: generated from the registration, nothing to be added for a new one."""

from __future__ import annotations

import inspect
import json
import re
import time
from xml.etree import ElementTree

import pytest

from polytask.recipes import Evidence, recipes

ALL = [pytest.param(info, id=info.name) for info in recipes()]


@pytest.fixture(scope="module")
def quick(request, tmp_path_factory):
    """The evidence of a quick look at one recipe, in memory and as files; run once for all tests."""
    info = request.param
    folder = tmp_path_factory.mktemp(info.name) / "run"
    started = time.process_time()
    evidence = info.factory().run(seeds=[0, 3], quick=True, out=folder)
    return info, evidence, folder, time.process_time() - started


@pytest.mark.parametrize("info", ALL)
def test_metadata_is_complete(info):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", info.name)
    assert re.match(r"arXiv:\d{4}\.\d{4,5}$|doi:|https://", info.paper)
    assert info.claim.endswith(".")
    assert len(info.reference) > 20
    assert info.seeds >= 3
    assert info.summary.endswith(("?", "."))
    parts = info.factory.__module__.split(".")
    if parts[:2] == ["polytask", "recipes"]:
        assert parts[2:] == [info.domain, info.name.replace("-", "_")], "the file is recipes/DOMAIN/NAME.py"


@pytest.mark.parametrize("info", ALL)
def test_arms_and_measures_are_named_once_and_something_stands_beside_the_method(info):
    arms, measures = info.factory.arms, info.factory.measures
    assert len({a.name for a in arms}) == len(arms)
    assert len({a.label for a in arms}) == len(arms)
    assert {"baseline", "method"} <= {a.role for a in arms}
    names = [m.name for m in measures]
    assert len(set(names)) == len(names)
    assert not {"arm", "seed", "candidate"} & set(names)
    assert any(m.higher_is_better is not None for m in measures)


@pytest.mark.parametrize("info", ALL)
def test_options_are_described_and_the_quick_ones_exist(info):
    options = info.factory().options
    described = inspect.getdoc(info.factory)
    assert all(re.search(rf"\b{name}\b", described.partition("Args:")[2]) for name in options)
    assert info.quick
    assert set(info.quick) <= set(options)
    assert info.factory().quickened().options == {**options, **info.quick}


@pytest.mark.parametrize("quick", ALL, indirect=True)
def test_a_quick_look_takes_seconds_and_leaves_valid_evidence(quick):
    info, evidence, folder, seconds = quick
    assert seconds < 60  # of processor time: a quick look that trains in full would take many times that
    found = json.loads((folder / "evidence.json").read_text())
    assert {"recipe", "paper", "claim", "holds", "seeds", "rows", "reference"} <= set(found)
    assert (found["recipe"], found["paper"], found["seeds"], found["quick"]) == (info.name, info.paper, [0, 3], True)
    assert isinstance(found["holds"], bool)
    assert found["holds"] == all(c["holds"] for c in found["checks"])
    arms = [a.name for a in info.factory.arms]
    assert [(r["arm"], r["seed"]) for r in found["rows"]] == [(a, s) for s in (0, 3) for a in arms]
    for row in found["rows"]:
        assert all(isinstance(row[m.name], float) for m in info.factory.measures)
    assert Evidence.read(folder) == evidence


@pytest.mark.parametrize("quick", ALL, indirect=True)
def test_the_claim_is_judged_in_words_that_hold_numbers(quick):
    _, evidence, folder, _ = quick
    assert evidence.checks
    assert all(re.search(r"\d", c["text"]) for c in evidence.checks)
    page = (folder / "evidence.md").read_text()
    assert all(c["text"] in page for c in evidence.checks)
    assert "quick look" in page


@pytest.mark.parametrize("quick", ALL, indirect=True)
def test_figures_are_whole_svg_files_that_name_every_arm(quick):
    info, evidence, folder, _ = quick
    assert evidence.figures
    for name in evidence.figures:
        root = ElementTree.fromstring((folder / name).read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        numbers = [
            float(v)
            for e in root.iter()
            for k, v in e.attrib.items()
            if k in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2")
        ]
        assert numbers
        assert all(-1 <= v <= 5000 for v in numbers)
    drawn = "".join(ElementTree.fromstring((folder / evidence.figures[0]).read_text()).itertext())
    assert all(arm.label in drawn for arm in info.factory.arms)


@pytest.mark.parametrize("quick", ALL, indirect=True)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(quick):
    info, evidence, _, _ = quick
    again = info.factory().run(seeds=[3], quick=True)
    before = [r for r in evidence.rows if r["seed"] == 3]
    for one, other in zip(again.rows, before, strict=True):
        # the last digits of a matrix product may depend on where its operands lie in memory
        assert one == {k: pytest.approx(v, rel=1e-6, abs=1e-9) if isinstance(v, float) else v for k, v in other.items()}
    measured = [[r[m.name] for m in info.factory.measures] for r in evidence.rows]
    half = len(measured) // 2
    assert measured[:half] != measured[half:]

"""The HTML report: one well-formed page that loads nothing, says what the results say, and breaks on no name or missing value."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from polytask.errors import InputError, StorageError
from polytask.report import write_html
from polytask.report.markup import VOID
from polytask.report.numbers import plain
from polytask.report.page import page
from polytask.report.reading import pairs

Build = Callable[..., dict[str, Any]]
SECTIONS = {"verdict", "results", "methods", "curves", "weights", "interference", "groupings", "data", "cost", "replay"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, text collected by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "section":
            self.section = str(found["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.sections[self.section] = self.sections.get(self.section, "") + f" {data}"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def drawings(text: str) -> list[ElementTree.Element]:
    """The outermost SVG drawings, each parsed as strict XML."""
    text = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    found, depth, start = [], 0, 0
    for mark in re.finditer(r"<svg\b|</svg>", text):
        depth += 1 if mark.group() == "<svg" else -1
        if depth == 1 and mark.group() == "<svg":
            start = mark.start()
        if depth == 0:
            found.append(ElementTree.fromstring(text[start : mark.end()]))
    return found


def test_the_page_is_well_formed_and_has_every_part(results: dict[str, Any]) -> None:
    read = Page(page(results))
    assert set(read.sections) >= SECTIONS
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in read.of("a")} == SECTIONS - {"verdict"}


def test_the_page_loads_nothing(results: dict[str, Any]) -> None:
    text = page(results)
    read = Page(text)
    assert all("src" not in a for _, a in read.elements)
    assert not read.of("link")
    assert not read.of("img")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+|url\(|@import", text) == []
    policy = next(a["content"] for a in read.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_every_drawing_is_xml_and_says_what_it_shows(results: dict[str, Any]) -> None:
    found = drawings(page(results))
    assert len(found) > 40
    for drawn in found:
        if drawn.get("aria-hidden") != "true":
            assert drawn.get("role") == "img"
            title = drawn.find("title")
            assert title is not None
            assert title.text


def test_coordinates_lie_inside_the_charts(results: dict[str, Any]) -> None:
    charts = [d for d in drawings(page(results)) if d.get("class") == "chart"]
    assert len(charts) == 2 * len(results["tasks"]) + 3 + 1  # curves, methods whose weights move, gradient norms
    for chart in charts:
        width, height = map(float, str(chart.get("viewBox")).split()[2:])
        for line in chart.iter("path"):
            points = [tuple(map(float, p.split())) for p in re.split("[ML]", str(line.get("d"))) if p]
            assert points
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_the_numbers_are_those_of_the_results(results: dict[str, Any]) -> None:
    read = Page(page(results))
    shown = read.sections["results"]
    for task in results["tasks"]:
        assert task["name"] in shown
        for metric in task["metrics"]:
            found = metric["difference"]
            decimals = next(d for d in range(9) if (found["high"] - found["low"]) / 2 * 10**d >= 10 or d == 8)
            for value in (metric["single_task"]["mean"], metric["joint"]["mean"]):
                assert plain(value, decimals) in shown
            assert plain(found["mean"], decimals, sign=True) in shown
            assert f"[{plain(found['low'], decimals, sign=True)}, {plain(found['high'], decimals, sign=True)}]" in shown
    for method in results["methods"]:
        assert method["label"] in read.sections["methods"]
        assert f"{method['seconds']:.1f}" in read.sections["methods"]
    assert "+2.15" in read.sections["methods"]
    assert "+2.15" in read.sections["verdict"]
    assert "15,207" in read.sections["data"]


def test_effects_stand_in_words_and_not_in_colour_alone(results: dict[str, Any]) -> None:
    read = Page(page(results))
    assert "▲ 2 tasks gain" in read.sections["verdict"]
    assert "▼ 1 task loses" in read.sections["verdict"]
    assert "● no clear change" in read.sections["results"]


def test_a_lower_difference_is_a_gain_where_lower_is_better(build: Build) -> None:
    results = build(names=("cost",), kinds=("regression",))
    rmse = results["tasks"][0]["metrics"][0]
    assert rmse["difference"]["high"] < 0  # the fixture's first task gains
    assert not rmse["higher_is_better"]
    row = re.search(r"<tr><th scope=\"row\">rmse.*?</tr>", page(results), re.DOTALL)
    assert row is not None
    assert "▲ gains" in row.group()
    assert (
        f"{-100 * rmse['difference']['mean'] / rmse['single_task']['mean']:.1f}\N{NO-BREAK SPACE}% better"
        in row.group()
    )
    bar, dot = re.search(r"<circle cx=\"([\d.]+)%\"", row.group()), 50
    assert bar is not None
    assert float(bar.group(1)) > dot  # right of zero is better


HOSTILE = ("<script>alert(1)</script>", "a\"b'c & d", "</svg></script>\x00\x1b", "naïve 漢字 🙂")


def test_names_of_the_user_are_text(build: Build) -> None:
    results = build(names=HOSTILE)
    for part in (results["data"], results["verdict"]):
        part["source" if "source" in part else "text"] = HOSTILE[0]
    results["data"]["columns"] = list(HOSTILE)
    results["methods"][1]["label"] = HOSTILE[0]
    text = page(results, run=HOSTILE[0])
    read = Page(text)
    assert len(read.of("script")) == 2  # the page's own and the frames of the heat-map
    assert "<script>alert" not in text
    assert "<script>alert(1)</script>" in read.sections["results"]
    assert drawings(text)


def without(results: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {k: v for k, v in results.items() if k not in parts}


def test_what_is_missing_is_said_and_not_shown_as_a_number(results: dict[str, Any]) -> None:
    bare = copy.deepcopy(without(results, "history", "interference", "grouping", "cost", "budget", "data"))
    for task in bare["tasks"]:
        for metric in task["metrics"]:
            metric["difference"] = {"mean": None, "low": float("nan"), "high": None}
            metric["joint"] = None
    for method in bare["methods"]:
        method |= {"delta_m_tasks": float("nan"), "delta_m_tasks_interval": None, "mean_rank": None, "seconds": None}
    text = page(bare)
    read = Page(text)
    assert not re.search(r"\b(nan|None|inf)\b", " ".join(read.sections.values()))
    assert "○ no interval" in read.sections["results"]
    assert "n/a" in read.sections["methods"]
    assert "not observed" in read.sections["interference"]
    assert drawings(text)


@pytest.mark.parametrize(
    ("names", "seeds", "epochs"),
    [(("only",), 1, 1), (("a", "b"), 1, 20), (tuple(f"task {i}" for i in range(14)), 2, 3)],
)
def test_any_number_of_tasks_seeds_and_epochs(build: Build, names: tuple[str, ...], seeds: int, epochs: int) -> None:
    results = build(names=names, seeds=seeds, epochs=epochs)
    text = page(results)
    read = Page(text)
    assert drawings(text)
    bands = [a for a in read.of("polygon") if str(a["class"]).startswith("band")]
    assert bool(bands) == (seeds > 1 and epochs > 1)
    if len(names) == 1:
        assert "only one task" in read.sections["interference"]
    else:
        assert len([a for a in read.of("g") if "data-cell" in a]) == len(names) ** 2


def test_gaps_and_unequal_lengths_in_histories_are_drawn_as_gaps(results: dict[str, Any]) -> None:
    name = results["tasks"][0]["name"]
    for seed, history in results["history"]["upgrad"].items():
        history["train_loss"][name] = [1.0, None, 0.5, float("nan"), 0.4, 0.3] if seed == "0" else None
    results["history"]["single_task"] = {}
    chart = next(d for d in drawings(page(results)) if d.findtext("title") == f"{name}: training loss")
    path = next(p for p in chart.iter("path") if "joint" in str(p.get("class")))
    assert str(path.get("d")).count("M") == 3


def test_weights_are_shown_as_shares_of_their_total(results: dict[str, Any]) -> None:
    chart = next(d for d in drawings(page(results)) if d.findtext("title") == "UPGrad: share of the total weight")
    lines = json.loads(str(chart.get("data-chart")))["lines"]
    runs = [h["weights"] for h in results["history"]["upgrad"].values()]
    for line in lines:
        wanted = [
            sum(100 * w[line["name"]][e] / sum(v[e] for v in w.values()) for w in runs) / len(runs) for e in range(20)
        ]
        assert line["y"] == pytest.approx(wanted, rel=1e-3)


def test_weights_of_separate_networks_are_not_shares_of_one_total(results: dict[str, Any]) -> None:
    before = Page(page(results)).sections["weights"]
    moving = next(m for m in results["methods"] if m["name"] == "upgrad")
    results["methods"].append({**moving, "name": "groups", "label": "Groups of tasks"})
    results["history"]["groups"] = results["history"]["upgrad"]
    assert Page(page(results)).sections["weights"] == before


def test_fixed_weights_stand_in_words_even_without_a_history(results: dict[str, Any]) -> None:
    results["history"]["scalarization"] = {}
    names, percents = [t["name"] for t in results["tasks"]], (14, 21, 29, 36)  # weights 0.5, 0.75, 1 and 1.25
    shown = ", ".join(f"{n} {p}\N{NO-BREAK SPACE}%" for n, p in zip(names, percents, strict=True))
    assert shown in Page(page(results)).sections["weights"]


def test_a_pair_stands_beside_the_mean_null_of_its_two_tasks(results: dict[str, Any]) -> None:
    seen = results["interference"]
    seen["null_conflict_rate"] = [[0.1, 0.5, 0.2, 0.2]] * len(seen["epochs"])
    seen["conflict_rate"] = [[[0.9] * 4] * 4] * len(seen["epochs"])
    found = next(p for p in pairs(results) if {p.first, p.second} == set(seen["tasks"][:2]))
    assert found.null_rate == pytest.approx(0.3)
    assert found.excess == pytest.approx(0.6)
    assert found.epochs_above == (20, 20)


def test_the_slider_has_the_cosines_off_the_diagonal_and_the_null_on_it(results: dict[str, Any]) -> None:
    text = page(results)
    found = re.search(r'<script type="application/json" class="frames">(.*?)</script>', text)
    assert found is not None
    data = json.loads(found.group(1))
    seen = results["interference"]
    assert data["epochs"] == seen["epochs"]
    assert data["frames"][-1][0][1] == pytest.approx(seen["cosine"][-1][0][1], abs=5e-4)
    assert data["frames"][3][2][2] == pytest.approx(seen["null"][3][2], abs=5e-4)


def test_the_chosen_grouping_and_method_are_marked(results: dict[str, Any]) -> None:
    text = page(results)
    rows = re.findall(r"<tr class=\"chosen\">.*?</tr>", text, re.DOTALL)
    assert len(rows) == 2
    assert "UPGrad" in rows[0]
    assert all(t["name"] in rows[1] for t in results["tasks"])


def test_the_commands_name_the_folder_and_are_safe_to_paste(results: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "my run; rm x"
    folder.mkdir()
    written = write_html(results, folder / "report.html")
    read = Page(written.read_text(encoding="utf-8"))
    assert "polytask explain 'my run; rm x'" in read.sections["replay"]
    assert str(tmp_path) not in written.read_text(encoding="utf-8")


def test_a_usual_run_is_small_and_a_large_one_stays_below_a_megabyte(build: Build) -> None:
    assert len(page(build()).encode()) < 250_000
    large = build(names=tuple(f"a rather long name of a task {i}" for i in range(14)), epochs=120)
    assert len(page(large).encode()) < 1_000_000


def test_an_older_report_survives_a_failed_write(results: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"report\.html cannot be written: No space left"):
        write_html(results, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_does_not_exist_is_one_sentence(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        write_html(results, tmp_path / "absent" / "report.html")


@pytest.mark.parametrize("part", ["tasks", "methods", "verdict"])
def test_results_without_a_part_are_refused_before_anything_is_written(
    results: dict[str, Any], tmp_path: Path, part: str
) -> None:
    with pytest.raises(InputError, match=part):
        write_html(without(results, part), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_schema_of_the_future_is_refused(results: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="schema 2"):
        page(results | {"schema": 2})

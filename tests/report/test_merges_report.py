"""The report of a comparison of merging methods: what its verdict, its rows, its axes and its table say of known hits."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from polytask.merging.interference import interference
from polytask.report import merges_table
from polytask.report.merges import merge_page
from polytask.report.merges_reading import ahead_in, covered, settings
from polytask.report.reading import Interval
from polytask.report.strips import axis_labels, axis_of_most, strip
from polytask.training.data import TaskData
from polytask.training.merges import Candidate, MergeTask
from polytask.training.merges.compare import Judged
from polytask.training.merges.summary import summary

TASKS, ROWS, SEEDS = ("left", "right"), 400, 3
FIRST = ("experts", "base", "task_arithmetic")
Hits = npt.NDArray[np.uint8]


def right(share: float, draw: int, seeds: int = SEEDS) -> Hits:
    """Which rows are right, shape (tasks, seeds, rows): exactly this share of them in every seed, others for another draw."""
    rng = np.random.default_rng(draw)
    row = np.arange(ROWS) < round(share * ROWS)
    return rng.permuted(np.broadcast_to(row, (len(TASKS), seeds, ROWS)), axis=2).astype(np.uint8)


def results_of(
    hits: Mapping[str, Hits],
    *,
    scores: Mapping[str, float] | None = None,
    roles: Mapping[str, str] | None = None,
    options: Mapping[str, list[dict[str, Any]]] | None = None,
    tried: Mapping[str, list[list[dict[str, Any]]]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The results of candidates that are right on these rows, with validation scores of 0.5 where nothing else is said."""
    seeds = next(iter(hits.values())).shape[1]
    known = {"experts": "reference", "base": "reference", "task_arithmetic": "baseline"} | dict(roles or {})
    judged = {}
    for name, h in hits.items():
        judged[name] = [
            Judged(
                {
                    "options": (options or {}).get(name, [{}] * seeds)[s],
                    "score": (scores or {}).get(name, 0.5),
                    "seconds": (seconds or {}).get(name, 0.1),
                    "statistic_seconds": 0.0,
                    "peak_bytes": 4096,
                    "tried": [
                        {"options": o, "score": 0.5, "seconds": 0.1} for o in (tried or {}).get(name, [[{}]] * seeds)[s]
                    ],
                },
                {t: h[k, s] for k, t in enumerate(TASKS)},
            )
            for s in range(seeds)
        ]
    data = {t: TaskData(torch.zeros(ROWS, 1), {t: torch.zeros(ROWS, dtype=torch.long)}) for t in TASKS}
    states = {t: {"w": torch.eye(3).roll(k, 0)} for k, t in enumerate(TASKS)}
    return summary(
        [MergeTask(t, data[t], data[t]) for t in TASKS],
        [Candidate(n, lambda line: line.base, role=known.get(n, "method")) for n in hits],
        judged,
        [interference({"w": torch.zeros(3, 3)}, states)] * seeds,
        {"trials": 4, "proxy_rows": 8, "seeds": list(range(seeds))},
        {},
    )


def references(seeds: int = SEEDS) -> dict[str, Hits]:
    return dict(zip(FIRST, (right(1.0, 0, seeds), right(0.3, 1, seeds), right(0.5, 2, seeds)), strict=True))


def by_name(results: Mapping[str, Any]) -> dict[str, Any]:
    return {c["name"]: c for c in results["candidates"]}


def sections(page: str) -> dict[str, str]:
    """The markup of each section of a page."""
    return {m[1]: m[0] for m in re.finditer(r'<section id="(\w+)">.*?</section>', page, re.DOTALL)}


def words(markup: str) -> str:
    return " ".join(re.sub(r"<(?!wbr)[^>]*>", " ", markup).replace("<wbr>", "").split())


def rows_of(section: str) -> dict[str, list[str]]:
    """{first line of a row's head: its cells in words}."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", section.split("<tbody>")[1].split("</tbody>")[0], re.DOTALL):
        head, *cells = re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)
        found[words(head.split("<small>")[0])] = [words(head), *map(words, cells)]
    return found


def printed(results: Mapping[str, Any], width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(merges_table(results))
    return console.export_text()


@pytest.fixture(scope="module")
def many() -> dict[str, Any]:
    """Thirty methods near task arithmetic, of which validation takes one; two far above it, one below, one mask."""
    hits = references() | {f"near_{i:02d}": right(0.5, 10 + i) for i in range(30)}
    hits |= {"high": right(0.62, 50), "higher": right(0.66, 51), "low": right(0.2, 52), "mask": right(0.9, 53)}
    return results_of(hits, scores={"near_07": 0.9}, roles={"mask": "a mask for each task"})


def test_the_verdict_counts_what_is_not_told_apart_and_names_three(many: dict[str, Any]) -> None:
    said = many["verdict"]
    assert said["method"] == "near_07"
    assert said["text"].startswith("near_07, chosen on validation")
    # the other 29 and task arithmetic; the two above and the one below are told from it
    alike = set(said["alike"])
    assert alike >= {"task_arithmetic"}
    assert alike.isdisjoint({"high", "higher", "low", "mask", "near_07"})
    counted = re.search(
        r"Of (\d+) other methods that give one model,.*?(\d+) are not told from it \((.*?)\)", said["text"]
    )
    assert counted is not None
    assert (int(counted[1]), int(counted[2])) == (33, len(alike))
    best = sorted(alike, key=lambda n: -by_name(many)[n]["normalised"]["mean"])[:3]
    means = [by_name(many)[n]["normalised"]["mean"] for n in best]
    named = counted[3].removeprefix("best there: ").split(", ")
    assert [by_name(many)[n]["normalised"]["mean"] for n in named] == pytest.approx(means)
    assert "2 did better on test rows (higher, high)" in said["text"]
    assert "mask (a mask for each task) keeps 90.0 %" in said["text"]


def test_what_was_not_chosen_but_beats_task_arithmetic_is_named_with_what_chance_gives(many: dict[str, Any]) -> None:
    said = many["verdict"]
    told = [n for n, c in by_name(many).items() if c["role"] == "method" and c["difference"]["low"] > 0]
    assert set(said["above"]) == set(told) >= {"high", "higher"}
    sentence = next(s for s in said["text"].split(". ") if "told above task arithmetic" in s + ".")
    assert "higher, high; of 33 methods" in sentence
    # thirty-three methods beside task arithmetic, of which 2.5 % is under one
    assert "2.5 % (0.8)" in said["text"]


def test_nothing_above_task_arithmetic_gives_no_sentence() -> None:
    hits = references() | {"one": right(0.5, 3), "two": right(0.2, 4)}
    assert "told above" not in results_of(hits)["verdict"]["text"]
    # the chosen one is spoken of before
    hits["best"] = right(0.9, 5)
    said = results_of(hits, scores={"best": 0.9})["verdict"]
    assert said["above"] == ["best"]
    assert "told above" not in said["text"]
    assert "Of 3 other methods that give one model, none is as good on test rows" in said["text"]


def test_a_long_list_above_task_arithmetic_is_cut() -> None:
    hits = references() | {f"m{i}": right(0.8, 10 + i) for i in range(20)}
    said = results_of(hits, scores={"m0": 0.9})["verdict"]
    assert len(said["above"]) == 20
    assert "and 13 more; of 20 methods" in said["text"]


@given(st.floats(25, 1e6), st.integers(10, 60))
def test_an_outlier_does_not_stretch_the_axis_and_has_an_arrow_with_its_number(far: float, count: int) -> None:
    bulk = [Interval(m, m - 2, m + 2) for m in np.linspace(-1, 1, count)]
    off = Interval(far, far - 1, far + 1)
    axis = axis_of_most([*bulk, off])
    assert axis == axis_of_most([*bulk, Interval(2 * far, 2 * far - 1, 2 * far + 1)])
    assert axis.low <= -3
    assert 3 <= axis.high < 10
    drawn = strip([(off, "gain")], axis, "")
    assert "<circle" not in drawn
    number = re.findall(r"<text[^>]*>(.*?)</text>", drawn)
    assert len(number) == drawn.count("<path") == 1
    assert number[0].startswith("+")
    within = strip([(bulk[0], "even")], axis, "")
    assert "<circle" in within
    assert "<text" not in within
    assert "<path" not in within


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.5, 1)), min_size=1, max_size=40))
def test_an_axis_without_outliers_holds_every_interval(found: list[tuple[float, float]]) -> None:
    # no end of such is half the stretch of the others beyond them
    intervals = [Interval(m, -2 + m * 0.1, 2 + m * h * 0.1) for m, h in found]
    axis = axis_of_most(intervals)
    assert not any(axis.beyond(x) for i in intervals for x in i if x is not None)


def test_an_interval_that_leaves_the_axis_has_the_number_of_that_end_alone() -> None:
    axis = axis_of_most([Interval(0.0, -3.0, 3.0)])
    drawn = strip([(Interval(1.0, -2.0, 7.25), "even")], axis, "")
    assert re.findall(r"<text[^>]*>(.*?)</text>", drawn) == ["+7.2"]
    assert drawn.count("<circle") == drawn.count("<path") == 1
    left = strip([(Interval(-40.0, -50.0, -1.0), "lose")], axis, "")
    assert re.findall(r"<text[^>]*>(.*?)</text>", left) == ["−40.0"]
    assert "<circle" not in left


def test_the_axis_is_labelled_above_and_below_and_far_references_do_not_stretch_it(many: dict[str, Any]) -> None:
    section = sections(merge_page(many))["methods"]
    head, foot = (re.search(f"<{part}>.*?</{part}>", section, re.DOTALL) for part in ("thead", "tfoot"))
    assert head is not None
    assert foot is not None
    numbers = [re.findall(r"<text[^>]*>(.*?)</text>", part[0]) for part in (head, foot)]
    assert numbers[0] == numbers[1]
    assert "0" in numbers[0]
    ends = [float(n.replace("−", "-")) for n in numbers[0]]
    near = [c["difference"] for n, c in by_name(many).items() if n.startswith("near")]
    assert max(abs(e) for e in ends) < 4 * 100 * max(max(-d["low"], d["high"]) for d in near)
    # +50 points of the experts are off it
    drawn = next(r for r in re.findall(r"<tr.*?</tr>", section, re.DOTALL) if ">experts<" in r)
    assert re.findall(r'<text[^>]*class="off"[^>]*>(.*?)</text>', drawn) == ["+50.0"]
    assert numbers[0] == re.findall(r"<text[^>]*>(.*?)</text>", axis_labels(_axis(many), "", 8))


def _axis(results: Mapping[str, Any]) -> Any:
    shown = [c["difference"] for c in results["candidates"] if c["role"] not in ("reference", "baseline")]
    return axis_of_most(Interval(*(100 * d[k] for k in ("mean", "low", "high"))) for d in shown)


def test_only_what_was_searched_is_shown_and_every_lineage_has_its_setting() -> None:
    searched = [
        [{"scale": s, "density": 0.2, "rank": 4} for s in (0.5, 1.0)] + [{"scale": 0.5, "density": 0.9, "rank": 4}]
    ] * 3
    chosen = [{"steps": 125, "scale": s, "density": d, "rank": 4} for s, d in ((0.5, 0.2), (1.0, 0.2), (0.5, 0.2))]
    hits = references() | {"ours": right(0.5, 7), "fixed": right(0.5, 8)}
    made = results_of(hits, options={"ours": chosen, "fixed": [{"steps": 125}] * 3}, tried={"ours": searched})
    assert settings(by_name(made)["ours"]) == ["scale 0.5 / 1 / 0.5", "density 0.2 ×3"]
    assert settings(by_name(made)["fixed"]) == []
    section = sections(merge_page(made))["methods"]
    assert "in the order of seeds 0, 1, 2" in section
    assert rows_of(section)["ours"][-1] == "scale 0.5 / 1 / 0.5 density 0.2 ×3"
    assert "125" not in words(section.split("<tbody>")[1])
    one = results_of({n: h[:, :1] for n, h in hits.items()}, options={"ours": chosen[:1]}, tried={"ours": searched[:1]})
    assert settings(by_name(one)["ours"]) == ["scale 0.5", "density 0.2"]
    assert "in the order of seeds" not in merge_page(one)


def test_names_break_after_underscores_alone_and_chosen_stands_beside_the_role(many: dict[str, Any]) -> None:
    page = sections(merge_page(many))
    assert "near_<wbr>07" in page["methods"]
    assert "near_<wbr>07" in page["cost"]
    heads = re.findall(r'<th scope="row">(.*?)</th>', page["methods"])
    assert heads.count('near_<wbr>07<small><span class="tagged">chosen</span>method</small>') == 1
    assert sum("chosen" in h for h in heads) == 1
    assert set(rows_of(page["methods"])) == set(by_name(many))


def test_seconds_stand_on_a_logarithmic_axis_with_labelled_ends() -> None:
    taken = {"task_arithmetic": 0.02, "one": 0.2, "two": 20.0, "three": 63.0}
    made = results_of(references() | {n: right(0.5, i) for i, n in enumerate(("one", "two", "three"))}, seconds=taken)
    section = sections(merge_page(made))["cost"]
    where = [float(x) for x in re.findall(r'<circle cx="([\d.]+)%"', section)]
    decades = [np.log10(b / a) for a, b in itertools.pairwise(taken.values())]
    steps = np.diff(where)
    assert np.allclose(steps / decades, steps[0] / decades[0], rtol=1e-2)
    for part in ("thead", "tfoot"):
        scale = re.search(f"<{part}>.*?</{part}>", section, re.DOTALL)
        assert scale is not None
        assert re.findall(r"<text[^>]*>(.*?)</text>", scale[0]) == ["0.01 s", "0.1 s", "1 s", "10 s", "100 s"]


def test_lineages_in_which_a_method_is_ahead_are_counted() -> None:
    ours = right(0.5, 9)
    for seed, share in enumerate((0.6, 0.5, 0.45)):
        ours[:, seed] = right(share, seed)[:, seed]
    made = results_of(references() | {"ours": ours})
    own = by_name(made)["ours"]
    # experts get everything right, task arithmetic half of it
    assert own["difference_by_seed"] == pytest.approx([0.1, 0.0, -0.05])
    assert np.mean(own["difference_by_seed"]) == pytest.approx(own["difference"]["mean"])
    assert ahead_in(made, own) == "1 of 3"
    section = sections(merge_page(made))["methods"]
    assert rows_of(section)["ours"][4] == "1 of 3"
    assert rows_of(section)["task_arithmetic"][4] == ""
    assert "test rows and 3 lineages" in words(section)
    assert "little of how far lineages differ" in words(section)
    line = next(row for row in printed(made).splitlines() if row.split()[:1] == ["ours"])
    assert " 1/3 " in line


def test_relative_to_the_experts_of_the_same_lineage() -> None:
    hits = references() | {"ours": right(0.6, 3)}
    for seed, share in enumerate((0.8, 1.0, 0.5)):
        hits["experts"][:, seed] = right(share, seed)[:, seed]
    assert by_name(results_of(hits))["ours"]["difference_by_seed"] == pytest.approx([0.125, 0.1, 0.2])


@pytest.mark.parametrize("seeds", [1, 4])
def test_seeds_of_one_lineage_say_nothing_of_others(seeds: int) -> None:
    hits = {n: np.repeat(h, seeds, 1) for n, h in references(1).items()} | {"drawn": right(0.6, 3, seeds)}
    made = results_of(hits)
    assert made["lineages"] == 1
    assert "nothing of other fine-tunings" in covered(made)
    assert ahead_in(made, by_name(made)["drawn"]) == ""
    assert "Ahead" not in merge_page(made)
    assert "Ahead" not in printed(made)


def test_many_lineages_are_not_called_rough() -> None:
    hits = references(12) | {"ours": right(0.6, 3, 12)}
    assert covered(results_of(hits)) == "Intervals cover test rows and 12 lineages."


def test_what_repeats_the_mean_row_for_row_stands_in_one_line() -> None:
    hits = references() | {"average": right(0.45, 3), "own": right(0.45, 4)}
    hits |= {"first_copy": hits["average"].copy(), "second_copy": hits["average"].copy()}
    hits |= {"sum_copy": hits["task_arithmetic"].copy(), "nearly": hits["average"].copy()}
    hits["nearly"][0, 0, 0] ^= 1
    made = results_of(hits, scores={"own": 0.9})
    assert {n: c["same_as"] for n, c in by_name(made).items() if c["same_as"]} == {
        "first_copy": "average",
        "second_copy": "average",
        "sum_copy": "task_arithmetic",
    }
    page = sections(merge_page(made))
    for part in ("methods", "tasks"):
        assert set(rows_of(page[part])) == set(hits) - {"first_copy", "second_copy", "sum_copy"}
    said = words(page["methods"])
    assert "those of average, row for row, and no row of their own: first_copy, second_copy." in said
    assert "those of task_arithmetic, row for row, and no row of their own: sum_copy." in said
    # a merge of each was made all the same
    assert {"first_copy", "second_copy", "sum_copy"} < set(rows_of(page["cost"]))
    table = printed(made)
    assert "no row of their own: first_copy, second_copy." in " ".join(table.split())
    # average, nearly and task arithmetic
    assert "Of 3 other methods that give one model" in made["verdict"]["text"]


def test_a_chosen_method_that_repeats_another_keeps_its_row_and_is_called_that() -> None:
    hits = references() | {"average": right(0.45, 3)}
    hits["copy"] = hits["average"].copy()
    made = results_of(hits, scores={"copy": 0.9})
    assert "Its test results are those of average, row for row." in made["verdict"]["text"]
    assert "Of 1 other method that gives one model" in made["verdict"]["text"]
    assert {"copy", "average"} < set(rows_of(sections(merge_page(made))["methods"]))


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_table_fits(many: dict[str, Any], width: int) -> None:
    assert max(map(cell_len, printed(many, width).splitlines())) <= min(width, 100)
    longer = copy.deepcopy(many)
    for c in longer["candidates"]:
        c["label"] = f"{c['name']} with a name that goes on and on for longer than any column"
    assert max(map(cell_len, printed(longer, width).splitlines())) <= min(width, 100)


def test_the_table_keeps_names_of_usual_length_whole(many: dict[str, Any]) -> None:
    renamed = copy.deepcopy(many)
    by_name(renamed)["low"]["label"] = "adamerging with labels"
    assert "adamerging with labels" in printed(renamed)


def test_results_without_lineages_of_their_own_are_still_shown(many: dict[str, Any]) -> None:
    older = copy.deepcopy(many)
    del older["lineages"]
    for c in older["candidates"]:
        del c["difference_by_seed"], c["same_as"]
    page = sections(merge_page(older))
    assert "Ahead" not in page["methods"]
    assert set(rows_of(page["methods"])) == set(by_name(many))
    assert "near_07" in printed(older)
    ElementTree.fromstring(page["methods"].replace("<wbr>", ""))

"""The tables for the terminal: within 100 columns and the window, with the numbers of the results, in any encoding."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from polytask.errors import InputError
from polytask.report import explain, methods_table, verdict_table

Build = Callable[..., dict[str, Any]]
ALL = (verdict_table, methods_table, explain)


def printed(renderable: object, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding, newline="\n"), width=width, legacy_windows=False)
    console.print(renderable)
    console.file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("table", ALL)
def test_nothing_is_wider_than_the_window_or_100_columns(build: Build, table: Any, width: int) -> None:
    long = tuple(f"a_name_that_goes_on_and_on_for_a_while_and_then_some_more_{i}" for i in range(13))
    for results in (
        build(),
        build(names=long, kinds=("binary", "regression", "ordinal")),
        build(names=("漢字漢字漢字漢字漢字漢字", "b")),
    ):
        lines = printed(table(results), width).splitlines()
        assert max(map(cell_len, lines)) <= min(width, 100)


def test_the_verdict_leads_and_every_metric_follows(results: dict[str, Any]) -> None:
    text = printed(verdict_table(results), 100)
    assert "Train these 4 targets together with UPGrad." in " ".join(text.replace("│", " ").split())
    rows = {line.split()[1]: line for line in text.splitlines() if line.strip().startswith(("↑", "↓"))}
    assert set(rows) == {m["name"] for t in results["tasks"] for m in t["metrics"]}
    assert "1,234.5" in rows["rmse"]
    assert f"{results['tasks'][0]['metrics'][0]['joint']['mean']:,.1f}" in rows["rmse"]
    assert "▲ gains" in rows["rmse"]
    assert "▼ loses" in rows["roc_auc"]


def test_the_drawn_interval_lies_on_the_better_side_of_zero(results: dict[str, Any]) -> None:
    rows = {
        line.split()[1]: line
        for line in printed(verdict_table(results), 100).splitlines()
        if "●" in line and "│" in line
    }
    assert rows["rmse"].index("│") < rows["rmse"].index("●")
    assert rows["roc_auc"].index("│") > rows["roc_auc"].index("●")


def test_methods_stand_in_the_order_of_their_gain_and_the_chosen_one_is_marked(results: dict[str, Any]) -> None:
    lines = printed(methods_table(results), 100).splitlines()
    labels = [m["label"] for m in sorted(results["methods"], key=lambda m: -m["delta_m_tasks"])]
    at = [next(i for i, line in enumerate(lines) if label in line) for label in labels]
    assert at == sorted(at)
    assert lines[at[0]].strip().startswith("* UPGrad")
    assert "+2.15 [+1.45, +2.85]" in lines[at[0]]


def test_the_explanation_ranks_pairs_by_conflict_beyond_the_null(results: dict[str, Any]) -> None:
    text = printed(explain(results), 100)
    assert results["interference"]["sentences"][0] in text
    rows = [line for line in text.splitlines() if " – " in line]
    assert len(rows) == 6
    excess = [int(row.split("%")[0].split()[-1]) - int(row.split("%")[1].split()[-1]) for row in rows]
    assert excess == sorted(excess, reverse=True)
    assert "conflict above the null" in rows[0]
    assert "aligned on average" in rows[-1]


def test_a_test_of_the_study_overrules_the_comparison_of_rates(results: dict[str, Any]) -> None:
    epochs = len(results["interference"]["epochs"])
    results["interference"]["conflicting"] = [[[0, 1]]] * (epochs - 1) + [[[0, 2]]]
    rows = [line for line in printed(explain(results), 100).splitlines() if " – " in line]
    readings = {row.split("–")[0].strip() + "–" + row.split("–")[1].split()[0]: row for row in rows}
    assert "conflict by the test" in next(r for k, r in readings.items() if k.startswith("insurance_cost–health"))
    assert "conflict in some epochs" in next(r for k, r in readings.items() if k.startswith("insurance_cost–smoker"))
    assert "within noise" in next(r for k, r in readings.items() if k.startswith("smoker–health"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("table", ALL)
def test_a_terminal_without_unicode_still_shows_it(build: Build, table: Any, encoding: str) -> None:
    text = printed(table(build(names=("naïve", "漢字", "c"))), 100, encoding)
    assert text.strip()


def test_signs_have_plain_stand_ins(results: dict[str, Any]) -> None:
    text = printed(verdict_table(results), 100, "ascii")
    assert "+ gains" in text
    assert "- loses" in text
    assert "-40.5" in text


def test_user_names_are_not_read_as_console_markup(build: Build) -> None:
    results = build(names=("[red]x[/red]", "[/]"))
    for table in (verdict_table, explain):
        assert "[red]x[/red]" in printed(table(results), 100)


def test_one_task_one_seed_and_no_observation_are_said(build: Build) -> None:
    one = build(names=("only",), seeds=1)
    assert "only one task" in printed(explain(one), 100)
    two = build(names=("a", "b")) | {"interference": None}
    assert "not observed" in printed(explain(two), 100)
    one["tasks"][0]["metrics"][0]["difference"] |= {"low": None, "high": None}
    assert "○ no interval" in printed(verdict_table(one), 100)


@pytest.mark.parametrize("table", ALL)
def test_results_that_are_none_are_refused_at_once(table: Any) -> None:
    with pytest.raises(InputError, match="tasks"):
        table({"schema": 1})

"""Recipes on the command line: a small one of our own, entered for the time of a test, that runs in no time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from polytask.errors import TrainingError
from polytask.recipes import Arm, Check, Measure, Recipe, Results, Trial, recipe, recipes, registration

FIXED_KEYS = {"recipe", "paper", "claim", "holds", "seeds", "rows", "reference"}


def enter(name: str, gain: float) -> None:
    @recipe(
        name,
        domain="tests",
        paper="none",
        claim="two is more than one",
        reference="arithmetic",
        seeds=3,
        quick={"size": 1},
    )
    class Made(Recipe):
        """A recipe of one line."""

        size: int = 2
        arms = (Arm("equal", "Equal weighting"), Arm("ours", "Ours", "method"))
        measures = (Measure("error", "an error"),)

        def trial(self, arm: str, seed: int, candidate: Any = None) -> Trial:
            if gain != gain:
                raise TrainingError("the loss of task 'a' is nan")
            return Trial({"error": 1.0 + seed - (gain if arm == "ours" else 0.0)})

        def judge(self, results: Results) -> Sequence[Check]:
            return [Check(f"ours is better by {gain}", gain > 0)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes()  # what there is, found before ours come
    monkeypatch.setattr(registration, "_recipes", {})
    enter("it-holds", 1.0)
    enter("it-does-not", -1.0)
    enter("it-breaks", float("nan"))


def test_recipes_lists_every_recipe_with_its_claim(polytask):
    listed = json.loads(polytask("recipes", "--json").stdout)
    assert {"came-grad", "madam"} <= {r["name"] for r in listed}
    assert all(r["claim"] and r["paper"] for r in listed)
    shown = polytask("recipes").stdout
    assert "came-grad" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(("name", "holds"), [("it-holds", True), ("it-does-not", False)])
def test_run_ends_with_0_whether_or_not_the_claim_held(polytask, made, tmp_path, name, holds):
    result = polytask("run", name, "--out", tmp_path / "evidence")
    assert result.exit_code == 0, result.stderr
    assert ("The claim holds" if holds else "The claim does not hold") in result.stdout
    evidence = json.loads((tmp_path / "evidence/evidence.json").read_text())
    assert set(evidence) >= FIXED_KEYS
    assert evidence["holds"] is holds
    assert evidence["seeds"] == [0, 1, 2]
    assert len(evidence["rows"]) == 6


def test_seeds_and_quick_reach_the_recipe(polytask, made, tmp_path):
    result = polytask("run", "it_holds", "--out", tmp_path / "e", "--seeds", "2", "--quick", "--json")
    evidence = json.loads(result.stdout)
    assert evidence["seeds"] == [0, 1]
    assert evidence["quick"] is True
    assert evidence["options"] == {"size": 1}


def test_a_recipe_that_cannot_go_on_ends_with_3_and_leaves_nothing(polytask, made, tmp_path):
    result = polytask("run", "it-breaks", "--out", tmp_path / "evidence")
    assert result.exit_code == 3
    assert result.stderr == "Error: the loss of task 'a' is nan\n"
    assert not (tmp_path / "evidence").exists()


def test_an_unknown_recipe_is_named_with_its_neighbours(polytask, made, tmp_path):
    result = polytask("run", "it-hold", "--out", tmp_path / "evidence")
    assert result.exit_code == 2
    assert "did you mean" in result.stderr
    assert "it-holds" in result.stderr


def test_run_never_writes_into_a_folder_that_holds_something(polytask, made, tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    result = polytask("run", "it-holds", "--out", tmp_path)
    assert result.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_verify_prints_one_line_a_recipe(polytask, made, tmp_path):
    result = polytask("verify", "it-holds", "it-does-not", "--json", "--out", tmp_path / "claims")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(e["recipe"], e["holds"], e["outcome"]) for e in lines] == [
        ("it-holds", True, "holds"),
        ("it-does-not", False, "does not hold"),
    ]
    assert "1 of 2 claims hold" in (tmp_path / "claims/claims.md").read_text()


def test_verify_runs_the_others_when_one_breaks_and_says_so(polytask, made):
    result = polytask("verify", "--json")
    assert result.exit_code == 3
    outcomes = {e["recipe"]: e["outcome"] for e in map(json.loads, result.stdout.splitlines())}
    assert outcomes == {"it-holds": "holds", "it-does-not": "does not hold", "it-breaks": "did not run"}
    assert "it-breaks" in result.stderr


def test_the_page_for_people_of_verify(polytask, made):
    shown = polytask("verify", "it-does-not", "--seeds", "1").stdout
    assert "does not hold" in shown
    assert "two is more than one" in shown

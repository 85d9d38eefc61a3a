"""The recipe contract itself: seeds, candidates, statistics, files, names, the page of claims."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from polytask.errors import InputError, MissingExtraError, StorageError, TrainingError
from polytask.recipes import (
    Arm,
    Check,
    Evidence,
    Measure,
    Recipe,
    Results,
    Trial,
    claims_page,
    find_recipe,
    recipe,
    run_recipe,
    verify,
)
from polytask.recipes import registration as registry
from polytask.recipes.results import Row, interval


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    registry.recipes()  # the library's own are found once, before the copy
    monkeypatch.setattr(registry, "_recipes", dict(registry._recipes))


@pytest.fixture
def example():
    """A recipe that costs nothing."""
    return define("toy-example")


def define(name, **changed):
    metadata = {
        "domain": "toys",
        "paper": "arXiv:0000.00000",
        "claim": "Ours is lower.",
        "reference": "none",
        "seeds": 4,
    }

    @recipe(name, quick={"size": 1.0}, **{**metadata, **changed})
    class Toy(Recipe):
        """Is ours lower?

        Args:
            size: of everything.
        """

        size: float = 10.0
        arms: ClassVar = (
            Arm("base", "the base"),
            Arm("tuned", "tuned", candidates=(1, 2, 3)),
            Arm("ours", "ours", "method"),
        )
        measures: ClassVar = (Measure("loss", "a loss"), Measure("score", "a score", True))

        def trial(self, arm, seed, candidate=None):
            start = {"base": 2.0, "tuned": 3.0, "ours": 1.0}[arm] + 0.01 * seed
            loss = self.size * (start + abs((candidate or 2) - 2))
            # what selects disagrees with what is reported: candidate 3 has the lowest selection value
            return Trial({"loss": loss, "score": -loss}, selection=None if candidate is None else -float(candidate))

        def judge(self, results):
            return [
                Check(
                    f"lower by {results.gain('ours', 'base', 'loss').mean():.2f}",
                    results.better("ours", "base", "loss", "score"),
                )
            ]

    return Toy


def test_rows_are_arms_by_seeds_and_the_candidate_is_chosen_on_validation_only(example):
    evidence = example().run()
    assert evidence.seeds == [0, 1, 2, 3]
    assert evidence.holds
    assert [(r["arm"], r["seed"]) for r in evidence.rows][:4] == [("base", 0), ("tuned", 0), ("ours", 0), ("base", 1)]
    tuned = [r for r in evidence.rows if r["arm"] == "tuned"]
    assert all(r["candidate"] == 3 and r["loss"] == pytest.approx(10 * (4 + 0.01 * r["seed"])) for r in tuned)
    assert all("candidate" not in r for r in evidence.rows if r["arm"] != "tuned")


def test_progress_counts_every_trial_and_candidate(example):
    seen = []
    example().run(seeds=2, progress=lambda text, done, total: seen.append((text, done, total)))
    assert [done for _, done, _ in seen] == list(range(1, 11))
    assert {total for _, _, total in seen} == {10}
    assert seen[0][0] == "the base, seed 0"


def test_quick_uses_the_small_options_and_two_seeds_and_says_so(example):
    evidence = example().run(quick=True)
    assert (evidence.quick, evidence.options, evidence.seeds) == (True, {"size": 1.0}, [0, 1])
    assert evidence.rows[0]["loss"] == 2.0
    assert "quick look" in evidence.markdown()
    assert "quick look" not in example().run().markdown()


def test_options_by_name(example):
    assert run_recipe("toy-example", options={"size": 5.0}).rows[0]["loss"] == 10.0
    with pytest.raises(InputError, match=r"'colour'.*size"):
        run_recipe("toy-example", options={"colour": "red"})


@pytest.mark.parametrize("seeds", [0, [], [1, 1]])
def test_seeds_that_cannot_be_meant(example, seeds):
    with pytest.raises(InputError, match="at least one seed"):
        example().run(seeds)


def test_evidence_round_trips_and_names_the_documented_keys(example, tmp_path):
    evidence = example().run(out=tmp_path / "deep" / "run")
    written = json.loads((tmp_path / "deep" / "run" / "evidence.json").read_text())
    assert list(written)[:7] == ["recipe", "paper", "claim", "holds", "seeds", "rows", "reference"]
    assert Evidence.read(tmp_path / "deep" / "run") == evidence
    assert sorted(p.name for p in (tmp_path / "deep" / "run").iterdir()) == [
        "evidence.json",
        "evidence.md",
        "measures.svg",
    ]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_a_folder_that_holds_something_is_refused_before_any_trial(example, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    seen = []
    with pytest.raises(InputError, match="run exists already"):
        example().run(out=tmp_path / "run", progress=lambda *a: seen.append(a))
    assert not seen
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert example().run(out=tmp_path / "empty").holds
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file exists already"):
        example().run(out=tmp_path / "file")


def test_what_cannot_be_written_leaves_nothing(example, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=r"toy-example cannot be written.*No space left"):
        example().run(out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "{", "[]", '{"recipe": "x"}'])
def test_evidence_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "evidence.json").write_text(content)
    with pytest.raises(StorageError, match=r"evidence\.json cannot be read"):
        Evidence.read(tmp_path)


def test_a_measure_that_is_not_finite_names_arm_and_seed(example, monkeypatch):
    monkeypatch.setattr(
        example, "trial", lambda self, arm, seed, candidate=None: Trial({"loss": float("nan"), "score": 0.0})
    )
    with pytest.raises(TrainingError, match="the base with seed 0 ended with loss = nan"):
        example().run()


def test_candidates_without_a_validation_value_are_refused(example, monkeypatch):
    monkeypatch.setattr(example, "trial", lambda self, arm, seed, candidate=None: Trial({"loss": 1.0, "score": 0.0}))
    with pytest.raises(TrainingError, match="tuned has candidates"):
        example().run()


def test_statistics_of_results():
    rows = [Row(arm, s, None, Trial({"loss": base + s})) for s in range(5) for arm, base in (("a", 0.0), ("b", 1.0))]
    results = Results(rows, [Measure("loss", "a loss")])
    assert results.seeds == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(results.gain("a", "b", "loss"), np.ones(5))
    assert results.better("a", "b", "loss")
    assert not results.better("b", "a", "loss")
    assert results.share_better("a", "b", "loss") == 1.0
    assert results.mean("b", "loss") == 3.0
    with pytest.raises(KeyError, match="no arm"):
        results.values("c", "loss")


def test_interval_is_students_and_covers_as_often_as_it_says():
    # 0..4: mean 2, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.7764451052
    np.testing.assert_allclose(
        interval(np.arange(5.0)), (2 - 2.7764451052 * 0.5**0.5, 2 + 2.7764451052 * 0.5**0.5), rtol=1e-6
    )
    assert interval(np.ones(1)) == (None, None)
    draws = np.random.default_rng(0).standard_normal((2000, 4))
    bounds = np.array([interval(d) for d in draws])
    assert np.mean((bounds[:, 0] < 0) & (bounds[:, 1] > 0)) == pytest.approx(0.95, abs=0.02)


def test_names_are_found_however_they_are_spelt_and_unknown_ones_get_a_suggestion():
    assert find_recipe("CAME_Grad").name == "came-grad"
    with pytest.raises(InputError, match="did you mean came-grad"):
        find_recipe("came-gras")


def test_a_name_is_taken_once(example):
    with pytest.raises(ValueError, match="already taken"):
        define("Toy_Example")


def test_verify_writes_the_page_of_claims_with_those_that_fail(example, tmp_path, monkeypatch):
    def refuse(self, arm, seed, candidate=None):
        raise MissingExtraError("this recipe", "lightning")

    losing, broken = define("losing-toy", claim="The base is lower."), define("broken-toy", claim="Never seen.")
    monkeypatch.setattr(losing, "judge", lambda self, results: [Check("0.5 is not met", False)])
    monkeypatch.setattr(broken, "trial", refuse)
    found = verify(["losing-toy", "toy-example", "broken-toy"], out=tmp_path / "claims")
    assert [e.outcome for e in found] == ["does not hold", "holds", "did not run"]
    page = (tmp_path / "claims" / "claims.md").read_text()
    assert "1 of 3 claims hold." in page
    assert "✗ 0.5 is not met" in page
    assert "polytask[lightning]" in page
    assert (tmp_path / "claims" / "toy-example" / "measures.svg").is_file()
    assert "toy-example/measures.svg" in page
    assert page.rstrip("\n") == claims_page(found)
    with pytest.raises(InputError, match="no recipe"):
        verify(["toy-example", "nonsense-xyz"], out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_recipe_of_another_package_joins_through_the_entry_point(monkeypatch, tmp_path):
    (tmp_path / "outside_recipes.py").write_text(
        "from polytask.recipes import Arm, Check, Measure, Recipe, Trial, recipe\n"
        "@recipe('outside-toy', domain='toys', paper='arXiv:0000.00001', claim='It runs.', reference='none', seeds=3, quick={'n': 1})\n"
        "class Outside(Recipe):\n"
        "    '''Does it run?'''\n"
        "    n: int = 2\n"
        "    arms = (Arm('a', 'base'), Arm('b', 'ours', 'method'))\n"
        "    measures = (Measure('loss', 'a loss'),)\n"
        "    def trial(self, arm, seed, candidate=None):\n"
        "        return Trial({'loss': float(self.n + (arm == 'a') + seed)})\n"
        "    def judge(self, results):\n"
        "        return [Check('1 of 1', results.better('b', 'a', 'loss'))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint("toys", "outside_recipes", "polytask.recipes")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == "polytask.recipes" else []
    )
    registry._discover.cache_clear()
    assert [r.name for r in registry.recipes("toys")] == ["outside-toy"]
    assert run_recipe("outside-toy").holds


def test_evidence_prints_within_a_terminal(example):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(example().run().table())
    text = console.export_text()
    assert "ours" in text
    assert "loss ↓" in text
    assert "score ↑" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_example_of_the_documentation_is_a_recipe(monkeypatch, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    code = next(block.partition("```")[0] for block in page.split("```python\n")[1:] if "@recipe(" in block)
    (tmp_path / "documented_example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("documented_example")
    evidence = run_recipe("small-steps", out=tmp_path / "run")
    assert evidence.holds
    assert {r["candidate"] for r in evidence.rows if r["arm"] == "tuned"} <= {0.3, 0.1, 0.03, 0.01}
    assert "distance" in (tmp_path / "run" / "measures.svg").read_text(encoding="utf-8")

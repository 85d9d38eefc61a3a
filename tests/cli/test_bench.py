"""``polytask bench`` as a user meets it: both verbs run for real, killed and resumed, and given nonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .bench_data import image_folder
from .conftest import make_table
from .test_bad_input import refused

TINY = ("--rows", "120", "--seeds", "2", "--epochs", "2", "--trials", "2", "--workers", "1")
BESIDE = """
from polytask.benchmark import Contender
from polytask.benchmark.contenders import plain

def contenders():
    return [Contender("other 2.0", "MGDA", "exact", plain), Contender("other 2.0", "famo", "values", plain)]
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory, polytask):
    """A finished benchmark of methods on images: (run folder, images, what was printed)."""
    folder = tmp_path_factory.mktemp("bench")
    images = image_folder(folder / "bars")
    result = polytask("bench", "methods", images, "--methods", "mgda,famo", "--out", folder / "run", *TINY)
    assert result.exit_code == 0, result.stderr
    return folder / "run", images, result


def test_methods_stand_beside_the_three_baselines_under_one_budget(compared):
    run, _, _ = compared
    results = json.loads((run / "results.json").read_text())
    rows = {m["name"]: m for m in results["methods"]}
    assert list(rows) == ["single_task", "equal", "scalarization", "mgda", "famo"]
    assert rows["single_task"]["delta_m_tasks"] == 0
    assert results["budget"]["seeds"] == [0, 1]
    assert results["data"]["split"]["train"] == 60
    assert all(m["learning_rate"] in (6e-3, pytest.approx(6e-3 / 10**0.5)) for m in rows.values())
    assert rows["scalarization"]["learning_rate"] == 6e-3
    for baseline in ("single_task", "equal", "scalarization"):
        found = results["comparison"]["against"][baseline]
        assert set(found) == set(rows) - {baseline}
        for name, difference in found.items():
            expected = rows[name]["delta_m_tasks"] - rows[baseline]["delta_m_tasks"]
            assert difference["mean"] == pytest.approx(expected, abs=1e-9)
    assert not (run / "work").exists()
    assert (run / "logs").is_dir()


def test_what_is_printed_fits_and_says_what_cannot_be_told_apart(compared):
    run, _, result = compared
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("Report:")) <= 100
    said = " ".join(result.stdout.replace("│", " ").split())
    for sentence in json.loads((run / "results.json").read_text())["comparison"]["sentences"]:
        assert sentence in said
    page = (run / "report.html").read_text()
    assert "Against tuned scalarization" in page
    assert 'src="http' not in page


def test_a_finished_run_is_shown_again_and_never_replaced_unasked(polytask, compared):
    run, images, _ = compared
    before = (run / "results.json").read_bytes()
    again = polytask("bench", "methods", images, "--out", run, "--resume", "--json", *TINY)
    assert again.exit_code == 0, again.stderr
    assert [m["name"] for m in json.loads(again.stdout)["methods"]][-2:] == ["mgda", "famo"]
    refused(polytask("bench", "methods", images, "--methods", "mgda", "--out", run, *TINY), 2, str(run), "resume")
    other = polytask("bench", "methods", images, "--out", run, "--resume", *TINY, "--trials", "3")
    refused(other, 2, "cannot be resumed", "trials")
    assert (run / "results.json").read_bytes() == before


def test_a_table_is_compared_through_the_readers_of_fit(polytask, tmp_path):
    make_table().to_csv(tmp_path / "table.csv", index=False)
    options = (
        "--targets",
        "size",
        "--targets",
        "bought",
        "--kind",
        "size=regression",
        "--ignore",
        "day",
        "--split-by",
        "shop",
    )
    small = ("--seeds", "1", "--epochs", "2", "--trials", "1", "--workers", "1", "--methods", "uncertainty")
    result = polytask("bench", "methods", tmp_path / "table.csv", *options, *small, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [t["name"] for t in found["tasks"]] == ["size", "bought"]
    assert [m["name"] for m in found["methods"]][-1] == "uncertainty"
    assert found["data"]["source"] == "table.csv"


def test_steps_are_measured_beside_another_library(polytask, tmp_path):
    (tmp_path / "peers.py").write_text(BESIDE)
    options = ("--tasks", "2", "--trunk", "mlp", "--level", "auto", "--level", "exact", "--rounds", "2", "--no-memory")
    result = polytask(
        "bench", "steps", "--methods", "mgda", *options, "--beside", tmp_path / "peers.py", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    found = json.loads((tmp_path / "out/steps.json").read_text())
    rows = {(r["library"], r["level"]): r for r in found["rows"]}
    assert set(rows) == {("polytask", "representation"), ("polytask", "exact"), ("other 2.0", "exact")}
    theirs = rows[("other 2.0", "exact")]
    assert theirs["of_ours"] > 1  # the plain step in their name against two backward passes
    assert rows[("polytask", "exact")]["of_ours"] is None
    for row in rows.values():
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert "| mgda | other 2.0 | exact |" in (tmp_path / "out/steps.md").read_text()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--methods", "mgdaa"), ("'mgdaa'", "did you mean mgda")),
        (("--beside", "no_peers.py"), ("there is no file no_peers.py",)),
        (("--trunk", "lstm"), ("no trunk 'lstm'", "mlp, conv, transformer, wide")),
        (("--level", "deep"), ("auto, representation or exact, not 'deep'",)),
        (("--tasks", "0"), ("at least one task, not 0",)),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_steps_that_cannot_be_measured(polytask, options, parts):
    refused(polytask("bench", "steps", "--no-memory", "--rounds", "1", *options), 2, *parts)


def test_a_peer_file_that_does_not_import(polytask, tmp_path):
    (tmp_path / "peers.py").write_text("import no_such_library\n")
    result = polytask("bench", "steps", "--methods", "mgda", "--beside", tmp_path / "peers.py")
    refused(result, 2, "peers.py cannot be used beside polytask", "No module named 'no_such_library'")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("{images}", "--methods", "mgdaa"), ("'mgdaa'", "did you mean mgda")),
        (("{images}", "-t", "left"), ("holds images", "no option of tables")),
        (("{images}", "--right", "{table}"), ("table.csv", "holds no images")),
        (("{images}", "--rows", "10", "--right", "{images}/no"), ("no", "holds no images")),
        (("{empty}",), ("holds no images-idx3-ubyte files",)),
        (("{table}",), ("no target was named", "--target")),
        (("{table}", "-t", "size", "--right", "{images}"), ("--right is for pairs of images",)),
        (("{table}", "-t", "size"), ("only 'size' was given",)),
        (("{table}", "-t", "size", "-t", "b0ught"), ("did you mean bought",)),
        (("no.csv", "-t", "size", "-t", "bought"), ("there is no file no.csv",)),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else None,
)
def test_data_that_cannot_be_compared_on(polytask, tmp_path, table: Path, options, parts):
    (tmp_path / "empty").mkdir()
    places = {"images": image_folder(tmp_path / "bars"), "table": table, "empty": tmp_path / "empty"}
    given = [option.format(**places) for option in options]
    refused(polytask("bench", "methods", *given, "--out", tmp_path / "run"), 2, *parts)
    assert not (tmp_path / "run").exists()

"""Everything that can be wrong with what a user gives: the sentence printed, the exit code, and nothing left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import Result

from .conftest import SMALL, make_table

Edit = Callable[[pd.DataFrame], pd.DataFrame]
TARGETS = ("-t", "size", "-t", "bought")


def refused(result: Result, code: int, *parts: str) -> None:
    """One sentence on stderr that holds the parts, nothing on stdout, the exit code."""
    assert result.exit_code == code, result.stderr + result.stdout
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def with_column(name: str, values: object) -> Edit:
    return lambda frame: frame.assign(**{name: values})


def with_infinity(frame: pd.DataFrame) -> pd.DataFrame:
    frame.loc[7, "b"] = np.inf
    return frame


def with_one_label(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(bought=np.where(frame.index == 5, "yes", None))


def with_one_value(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(bought=np.where(frame.index % 2, "yes", None))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda frame: frame.rename(columns={"bought": "bougth"}), "no target column 'bought'; did you mean bougth"),
        (with_column("bought", "yes"), "'bought' is constant"),
        (with_column("size", 3.5), "'size' is constant"),
        (with_one_value, "'bought' has only one label value, 'yes'"),
        (with_one_label, "'bought' has only one label"),
        (with_column("bought", None), "'bought' has no label: all 240 are missing"),
        (with_column("size", np.inf), "'size' has 240 infinite values"),
        (with_infinity, "'b'"),
    ],
    ids=[
        "unknown",
        "constant class",
        "constant number",
        "one value",
        "one label",
        "all missing",
        "infinite target",
        "infinite feature",
    ],
)
def test_a_table_that_cannot_be_learnt(polytask, tmp_path, edit: Edit, sentence: str):
    edit(make_table()).to_csv(tmp_path / "table.csv", index=False)
    result = polytask("fit", tmp_path / "table.csv", *TARGETS, "--out", tmp_path / "run", *SMALL)
    refused(result, 2, sentence)
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_duplicate_column_names(polytask, tmp_path):
    frame = make_table()
    frame.columns = ["a", "b", "a", *frame.columns[3:]]
    frame.to_csv(tmp_path / "table.csv", index=False)
    result = polytask("fit", tmp_path / "table.csv", *TARGETS, "--out", tmp_path / "run", *SMALL)
    refused(result, 2, "table.csv has two columns called 'a'")


def test_an_empty_file(polytask, tmp_path):
    (tmp_path / "table.csv").touch()
    refused(polytask("fit", tmp_path / "table.csv", *TARGETS, "--out", tmp_path / "run"), 2, "table.csv is empty")


def test_a_header_without_rows(polytask, tmp_path):
    make_table().head(0).to_csv(tmp_path / "table.csv", index=False)
    refused(polytask("fit", tmp_path / "table.csv", *TARGETS, "--out", tmp_path / "run"), 2, "column names but no rows")


def test_a_truncated_parquet(polytask, tmp_path):
    path = tmp_path / "table.parquet"
    make_table().to_parquet(path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(
        polytask("fit", path, *TARGETS, "--out", tmp_path / "run"),
        5,
        "table.parquet is truncated or not a Parquet file",
    )


def test_a_truncated_gzip(polytask, tmp_path):
    path = tmp_path / "table.csv.gz"
    make_table().to_csv(path, index=False)
    path.write_bytes(path.read_bytes()[:-200])
    refused(polytask("fit", path, *TARGETS, "--out", tmp_path / "run"), 5, "table.csv.gz is truncated or damaged")


def test_a_file_that_is_not_there(polytask, tmp_path):
    refused(polytask("fit", tmp_path / "no.csv", *TARGETS), 2, "there is no file", "no.csv")


def test_a_folder_that_holds_something_else_is_never_replaced(polytask, table, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("irreplaceable")
    for extra in ((), ("--overwrite",), ("--resume",)):
        refused(polytask("fit", table, *TARGETS, "--out", out, *SMALL, *extra), 2, str(out))
        assert (out / "thesis.tex").read_text() == "irreplaceable"


def test_a_finished_run_is_replaced_only_when_told(polytask, finished, table):
    run, _, _ = finished
    before = (run / "results.json").read_bytes()
    refused(polytask("fit", table, *TARGETS, "--out", run, *SMALL), 2, str(run), "exists", "overwrite", "resume")
    assert (run / "results.json").read_bytes() == before


def test_a_run_is_not_resumed_with_other_settings(polytask, finished):
    run, table, _ = finished
    result = polytask("fit", table, *TARGETS, "--out", run, "--resume", *SMALL)
    refused(result, 2, "cannot be resumed")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ("--target",)),
        (("-t", "size"), ("only 'size' was given",)),
        ((*TARGETS, "--kind", "size"), ("NAME=KIND", "'size'")),
        ((*TARGETS, "--kind", "size=colourful"), ("'colourful' is no kind", "regression")),
        ((*TARGETS, "--kind", "weight=count"), ("'weight'", "not one of the targets")),
        ((*TARGETS, "--kind", "bought=regression"), ("'bought' cannot be of kind regression",)),
        ((*TARGETS, "--balance", "pcgrat"), ("'pcgrat'", "did you mean pcgrad")),
        ((*TARGETS, "--split-by", "market"), ("'market'",)),
        ((*TARGETS, "--split-by-time", "colour"), ("'colour'", "neither a date nor a number")),
        ((*TARGETS, "--ignore", "d4y"), ("'d4y'",)),
        (("--config", "run/config.yaml", "--epochs", "3"), ("--config", "as it was")),
        (("--config", "no/config.yaml"), ("no/config.yaml",)),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else None,
)
def test_options_that_do_not_fit_the_table(polytask, table, tmp_path, options, parts):
    refused(polytask("fit", table, "--out", tmp_path / "run", *options), 2, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["report"], ["explain"], ["predict"]])
def test_a_folder_that_is_no_run(polytask, table, tmp_path, command):
    arguments = [*command, tmp_path / "nothing", *([table] if command == ["predict"] else [])]
    refused(polytask(*arguments), 2, str(tmp_path / "nothing"))


def test_damaged_results(polytask, tmp_path):
    (tmp_path / "results.json").write_text('{"polytask": ')
    refused(polytask("report", tmp_path), 5, "results.json is damaged")


def test_a_class_unseen_in_training(polytask, finished, tmp_path):
    run, _, _ = finished
    make_table(20).assign(bought="perhaps").to_csv(tmp_path / "new.csv", index=False)
    refused(polytask("predict", run, tmp_path / "new.csv"), 2, "'bought' has the class 'perhaps', unseen in training")


def test_infinite_features_at_prediction(polytask, finished, tmp_path):
    run, _, _ = finished
    with_infinity(make_table(20)).to_csv(tmp_path / "new.csv", index=False)
    refused(polytask("predict", run, tmp_path / "new.csv", "--out", tmp_path / "out.csv"), 2, "'b'")
    assert not (tmp_path / "out.csv").exists()


def test_a_missing_feature_at_prediction(polytask, finished, tmp_path):
    run, _, _ = finished
    make_table(20).drop(columns="colour").to_csv(tmp_path / "new.csv", index=False)
    refused(polytask("predict", run, tmp_path / "new.csv"), 2, "'colour'")


def test_predictions_cannot_be_written_where_there_is_no_folder(polytask, finished, tmp_path):
    run, table, _ = finished
    refused(polytask("predict", run, table, "--out", tmp_path / "nowhere" / "p.csv"), 5, "nowhere")


def test_predictions_need_a_known_suffix(polytask, finished, tmp_path):
    run, table, _ = finished
    refused(polytask("predict", run, table, "--out", tmp_path / "p.xlsx"), 2, "p.xlsx", ".parquet")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; skipped where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs rights that are missing here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(polytask, table, small_disk):
    result = polytask("fit", table, *TARGETS, "--out", small_disk / "run", *SMALL)
    refused(result, 5, str(small_disk))
    assert "no space left" in result.stderr.lower() or "disk is full" in result.stderr
    assert not (small_disk / "run/results.json").exists()
    assert not (small_disk / "run/model").exists()

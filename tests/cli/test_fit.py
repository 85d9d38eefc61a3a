"""From a table to a verdict, predictions, a report and a replay: the whole way on the command line."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
import yaml

from .conftest import SMALL, make_table


def test_a_run_leaves_what_it_promises(finished):
    run, _, result = finished
    assert {p.name for p in run.iterdir()} == {"config.yaml", "logs", "model", "report.html", "results.json"}
    assert "Verdict" in result.stdout
    assert "report.html" in result.stdout
    results = json.loads((run / "results.json").read_text())
    assert [t["name"] for t in results["tasks"]] == ["size", "bought"]
    assert [t["kind"] for t in results["tasks"]] == ["regression", "binary"]
    assert {m["name"] for m in results["methods"]} == {"single_task", "equal", "scalarization", "mgda"}
    assert {p.suffix for p in (run / "model").iterdir()} <= {".safetensors", ".json", ".skops"}


def test_a_pipe_gets_no_control_characters_and_at_most_a_hundred_columns(finished):
    _, _, result = finished
    assert "\x1b" not in result.stdout + result.stderr
    tables = [line for line in result.stdout.splitlines() if not line.startswith("Report:")]
    assert max(map(len, tables)) <= 100


def test_the_options_reach_the_study(finished):
    run, _, _ = finished
    study = yaml.safe_load((run / "config.yaml").read_text())["study"]
    assert study["targets"] == ["size", "bought"]
    assert study["by"] == "shop"
    assert study["ignore"] == ["day"]
    assert study["kinds"] == {"size": "regression"}
    assert study["balance"] == ["mgda"]
    assert study["seeds"] == [0]
    assert study["trials"] == 1
    assert study["grouping"] is False
    assert study["training"]["epochs"] == 2


def test_json_is_one_document_and_nothing_else(polytask, finished):
    run, _, _ = finished
    shown = json.loads(polytask("report", run, "--json").stdout)
    stored = json.loads((run / "results.json").read_text())
    assert shown["verdict"] == stored["verdict"]
    assert shown["tasks"] == stored["tasks"]
    assert "history" not in shown


def test_a_replay_gives_the_same_numbers(polytask, finished, tmp_path):
    run, table, _ = finished
    result = polytask(
        "fit", table, "--config", run / "config.yaml", "--out", tmp_path / "again", "--workers", "1", "--json"
    )
    assert result.exit_code == 0, result.stderr
    again, before = json.loads(result.stdout), json.loads((run / "results.json").read_text())
    assert again["tasks"] == before["tasks"]
    assert again["verdict"]["groups"] == before["verdict"]["groups"]
    assert (tmp_path / "again/model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_a_replay_on_another_table_is_refused(polytask, finished, tmp_path):
    run, _, _ = finished
    other = tmp_path / "other.csv"
    make_table(200).to_csv(other, index=False)
    result = polytask("fit", other, "--config", run / "config.yaml", "--out", tmp_path / "again")
    assert result.exit_code == 2
    assert "the table is not the one" in result.stderr
    assert not (tmp_path / "again").exists()


def test_predictions_on_stdout(polytask, finished):
    run, table, _ = finished
    result = polytask("predict", run, table)
    predicted = pd.read_csv(io.StringIO(result.stdout))
    assert len(predicted) == 240
    assert set(predicted["bought"]) <= {"yes", "no"}
    assert np.allclose(predicted["bought_probability_yes"] + predicted["bought_probability_no"], 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reader"), [("p.csv.gz", pd.read_csv), ("p.parquet", pd.read_parquet), ("p.feather", pd.read_feather)]
)
def test_predictions_in_every_form(polytask, finished, tmp_path, name, reader):
    run, table, _ = finished
    result = polytask("predict", run, table, "--out", tmp_path / name, "--intervals", "0.8")
    assert result.exit_code == 0, result.stderr
    predicted = reader(tmp_path / name)
    assert (predicted["size_low"] < predicted["size"]).all()
    assert (predicted["size"] < predicted["size_high"]).all()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_rows_without_targets_and_with_a_new_category_are_predicted(polytask, finished, tmp_path):
    run, _, _ = finished
    rows = make_table(20).drop(columns=["size", "bought", "shop", "day"])
    rows.loc[3, "colour"] = "ultraviolet"
    rows.to_csv(tmp_path / "new.csv", index=False)
    result = polytask("predict", run, tmp_path / "new.csv")
    assert result.exit_code == 0, result.stderr
    assert pd.read_csv(io.StringIO(result.stdout)).notna().all(axis=None)


def test_the_report_is_rebuilt_from_the_results(polytask, finished, tmp_path):
    run, _, _ = finished
    result = polytask("report", run, "--to", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page
    assert "bought" in page
    assert 'src="http' not in page


def test_explain_names_the_tasks(polytask, finished):
    run, _, _ = finished
    result = polytask("explain", run)
    assert result.exit_code == 0, result.stderr
    assert "size" in result.stdout
    assert "bought" in result.stdout
    diagnosis = json.loads(polytask("explain", run, "--json").stdout)
    assert diagnosis["tasks"] == ["size", "bought"]


def test_columns_name_a_file_without_header(polytask, tmp_path):
    make_table()[["a", "b", "c", "size", "bought"]].to_csv(tmp_path / "bare.csv", index=False, header=False)
    names = ("--columns", "a, b, c, size, bought")
    result = polytask(
        "fit", tmp_path / "bare.csv", *names, "-t", "size", "-t", "b0ught", "--out", tmp_path / "run", *SMALL
    )
    assert result.exit_code == 2
    assert "did you mean bought" in result.stderr

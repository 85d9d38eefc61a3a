"""The whole study: what it writes, that it can be replayed, resumed and run side by side, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from polytask.errors import InputError, StorageError
from polytask.metrics import delta_m
from polytask.training.jobs import StudyProgress
from polytask.training.study import Study, load_run, replay, run_study

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # a killed study imports the same cases from outside pytest

from study_cases import TARGETS, TINY, small_table, tiny_study, without_seconds  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return tiny_study(tmp_path_factory.mktemp("study") / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_folder_holds_what_it_should_and_nothing_half_done(finished: Study) -> None:
    names = {p.name for p in finished.folder.iterdir()}
    assert names == {"results.json", "config.yaml", "model", "logs"}
    assert set(files_of(finished.folder / "model")) == {
        "model.json", "model.safetensors", "encoder.json", "encoder.skops", "conformal.safetensors",
    }  # fmt: skip
    logs = list((finished.folder / "logs").glob("*/metrics.jsonl"))
    assert len(logs) >= 3 * 2 + 2 * 2  # single-task models and two joint methods, two seeds each
    assert all(len(log.read_text().splitlines()) == TINY["epochs"] for log in logs)


def test_results_have_the_names_fixed_for_everyone(finished: Study) -> None:
    r = finished.results
    assert list(r) == [
        "polytask", "schema", "data", "budget", "tasks", "methods", "verdict", "grouping", "history", "interference", "cost",
    ]  # fmt: skip
    assert [t["name"] for t in r["tasks"]] == list(TARGETS)
    assert [t["kind"] for t in r["tasks"]] == ["regression", "binary", "count"]
    assert r["tasks"][1]["classes"] == ["no", "yes"]
    assert 0.2 < r["data"]["missing"]["bought"] < 0.4
    assert r["data"]["missing"]["size"] == 0
    assert sum(r["data"]["split"][part] for part in ("train", "validation", "test")) == 300
    assert r["tasks"][1]["labels"]["test"] < r["tasks"][0]["labels"]["test"] == r["data"]["split"]["test"]
    assert set(r["data"]["columns"]) == {"a", "b", "c", "colour"}
    roles = {m["name"]: m["role"] for m in r["methods"]}
    assert roles["single_task"] == "reference"
    assert roles["equal"] == roles["scalarization"] == "baseline"
    assert roles["log_losses"] == "method"
    assert set(r["history"]) == set(roles)
    assert r["verdict"]["method"] in roles
    assert sorted(t for group in r["verdict"]["groups"] for t in group) == sorted(TARGETS)


def test_numbers_agree_with_each_other(finished: Study) -> None:
    r = finished.results
    rows = {m["name"]: m for m in r["methods"]}
    joint = rows[r["verdict"]["joint"]]
    assert rows["single_task"]["delta_m_tasks"] == rows["single_task"]["delta_m_metrics"] == 0
    assert rows["single_task"]["delta_m_tasks_interval"] == [0, 0]
    judged = {
        t["name"]: {m["name"]: m["higher_is_better"] for m in t["metrics"] if m["ratio_scale"]} for t in r["tasks"]
    }
    for row in rows.values():
        found = delta_m(row["values"], rows["single_task"]["values"], judged)
        assert row["delta_m_tasks"] == pytest.approx(found.over_tasks, abs=1e-9)
        assert row["delta_m_metrics"] == pytest.approx(found.over_metrics, abs=1e-9)
        assert row["delta_m_tasks_interval"][0] <= row["delta_m_tasks_interval"][1]
    n = len(rows)
    assert sum(m["mean_rank"] for m in rows.values()) == pytest.approx(n * (n + 1) / 2)
    for t in r["tasks"]:
        for m in t["metrics"]:
            assert m["joint"]["mean"] == joint["values"][t["name"]][m["name"]]
            assert m["difference"]["mean"] == pytest.approx(m["joint"]["mean"] - m["single_task"]["mean"])
            assert m["single_task"]["low"] < m["single_task"]["mean"] < m["single_task"]["high"]
        d, up = t["metrics"][0]["difference"], t["metrics"][0]["higher_is_better"]
        sure = d["low"] > 0 or d["high"] < 0
        assert (t["effect"] == "indifferent") == (not sure)
        assert (t["effect"] == "gains") == (sure and (d["low"] > 0) == up)
    weights = rows["scalarization"]["weights"]
    assert sum(weights.values()) == pytest.approx(3, rel=1e-3)


def test_histories_have_an_entry_an_epoch(finished: Study) -> None:
    r = finished.results
    for seeds in r["history"].values():
        assert set(seeds) == {"0", "1"}
        for h in seeds.values():
            epochs = len(h["epoch"])
            lists = [h["score"], h["seconds"], *h["train_loss"].values(), *h["weights"].values()]
            lists += [v for found in h["validation"].values() for v in found.values()]
            assert {len(v) for v in lists} == {epochs}
            assert set(h["train_loss"]) == set(TARGETS)
    seen = r["interference"]
    assert seen["tasks"] == list(TARGETS)
    assert len(seen["epochs"]) == len(seen["cosine"]) == len(seen["null"]) == TINY["epochs"]


def test_a_replay_gives_the_same_results_but_for_the_seconds(finished: Study, tmp_path: Path) -> None:
    again = replay(finished.folder / "config.yaml", small_table(), out=tmp_path / "again", workers=2)
    assert without_seconds(again.results) == without_seconds(finished.results)
    ours, theirs = (files_of(s.folder / "model") for s in (finished, again))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["conformal.safetensors"] == theirs["conformal.safetensors"]


def test_a_replay_on_another_table_is_refused(finished: Study, tmp_path: Path) -> None:
    table = small_table()
    table.loc[17, "a"] += 1
    with pytest.raises(InputError, match="is not the one that"):
        replay(finished.folder / "config.yaml", table, out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_interrupted_study_goes_on_where_it_stopped(finished: Study, tmp_path: Path) -> None:
    stages: list[StudyProgress] = []

    def stop(state: StudyProgress) -> None:
        stages.append(state)
        if state.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_study(tmp_path / "run", progress=stop)
    done = {p.parent: p.stat().st_mtime_ns for p in (tmp_path / "run" / "work").glob("*/outcome.json")}
    assert len(done) >= 5
    assert not (tmp_path / "run" / "results.json").exists()
    with pytest.raises(InputError, match="has not finished"):
        load_run(tmp_path / "run")
    kept: list[bool] = []

    def look(_: StudyProgress) -> None:
        kept.append(all(p.stat().st_mtime_ns == t for f, t in done.items() if (p := f / "outcome.json").exists()))

    resumed = tiny_study(tmp_path / "run", resume=True, progress=look)
    assert all(kept)
    assert without_seconds(resumed.results) == without_seconds(finished.results)
    assert not (tmp_path / "run" / "work").exists()


def test_a_study_killed_at_any_moment_ends_with_the_same_model(finished: Study, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path\n"
        f"from study_cases import tiny_study; tiny_study(Path({str(tmp_path / 'run')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoint = tmp_path / "run" / "work"
    while process.poll() is None and not list(checkpoint.glob("*/outcome.json")):
        time.sleep(0.01)
    time.sleep(0.15)  # well into the next training
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = tiny_study(tmp_path / "run", resume=True)
    assert (
        files_of(resumed.folder / "model")["model.safetensors"]
        == files_of(finished.folder / "model")["model.safetensors"]
    )
    assert without_seconds(resumed.results) == without_seconds(finished.results)


def test_a_finished_study_is_returned_and_another_one_not_resumed(finished: Study) -> None:
    before = (finished.folder / "results.json").stat().st_mtime_ns
    assert tiny_study(finished.folder, resume=True).results == finished.results
    assert (finished.folder / "results.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="setting 'trials' is 2, not 3"):
        tiny_study(finished.folder, resume=True, trials=3)


def test_a_folder_in_use_is_not_touched(finished: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists and is not empty"):
        tiny_study(finished.folder)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not empty: take another folder"):
        tiny_study(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="no run to resume"):
        tiny_study(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"targets": ("size",)}, "only 'size' was given"),
        ({"targets": ("size", "bougt")}, "no target column 'bougt'; did you mean bought"),
        ({"seeds": 0}, "at least one seed"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"balance": "nash-mlt"}, "no balancing method called 'nash-mlt'; did you mean nash_mtl"),
        ({"training": {"speed": 2}}, "no training setting 'speed'"),
        ({"ignore": ("shops",)}, "no ignored column 'shops'"),
        ({"ignore": ("a", "b", "c", "colour", "shop")}, "no feature column"),
        ({"by": "town"}, "'town'"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    arguments = {**TINY, **options}
    targets = arguments.pop("targets", TARGETS)
    with pytest.raises(InputError, match=sentence):
        run_study(small_table(), targets, out=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_damaged_config_or_result_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("study: [")
    with pytest.raises(StorageError, match="damaged"):
        replay(tmp_path / "config.yaml", small_table(), out=tmp_path / "x")
    (tmp_path / "results.json").write_text('{"polytask": ')
    with pytest.raises(StorageError, match="damaged"):
        load_run(tmp_path)


def test_groups_of_rows_stay_together_and_are_no_feature(tmp_path: Path) -> None:
    study = tiny_study(tmp_path / "run", by="shop", ignore=(), seeds=1, trials=1, grouping=False)
    assert "shop" not in study.results["data"]["columns"]
    assert "shop" in study.results["data"]["split"]["how"]
    assert any("one seed" in reason for reason in study.results["verdict"]["reasons"])
    assert yaml.safe_load((study.folder / "config.yaml").read_text())["study"]["by"] == "shop"


def test_a_real_table_goes_all_the_way(shared_data: Path, tmp_path: Path) -> None:
    from polytask.data import read_table

    path = next(iter(sorted((shared_data / "student_performance").glob("*.csv*"))))
    table = read_table(path)
    study = run_study(
        table, ["G3", "G1", "romantic"], out=tmp_path / "run", source=path.name, quick=True, epochs=6, workers=1
    )
    r = study.results
    assert json.loads((study.folder / "results.json").read_text()) == r
    values = {m["name"]: m["values"] for m in r["methods"]}
    G1 = table["G1"]
    # G2 is a feature and nearly tells the grades: any model that learnt must beat their spread
    assert values["equal"]["G1"]["rmse"] < 0.9 * G1.std()
    predicted = study.predict(table.drop(columns=["G3"]), intervals=0.9)
    assert len(predicted) == len(table)
    covered = ((predicted["G1_low"] <= G1) & (predicted["G1_high"] >= G1)).mean()
    assert covered > 0.8
    assert isinstance(predicted, pd.DataFrame)
    assert all(math.isfinite(m["seconds"]) and m["steps"] > 0 for m in r["methods"])

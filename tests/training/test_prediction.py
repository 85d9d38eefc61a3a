"""Prediction with a finished run: the columns, the intervals' promise, no pickle, damaged files, missing columns."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from polytask.errors import InputError, StorageError
from polytask.tasks import Binary, Count, Multilabel, Quantile, Regression, Task
from polytask.training.prediction import _columns, conformal_radius, conformal_scores, predict
from polytask.training.study import Study

sys.path.insert(0, str(Path(__file__).parent))

from study_cases import small_table, tiny_study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("prediction") / "run"
    return tiny_study(out, seeds=1, trials=1, grouping=False, epochs=6)


def test_columns_rows_and_probabilities(finished: Study) -> None:
    table = small_table().drop(columns=["size", "bought", "visits", "shop"])
    table.index = pd.Index([f"row {i}" for i in range(len(table))])
    found = predict(finished.folder, table)
    assert list(found.columns) == ["size", "bought", "bought_probability_no", "bought_probability_yes", "visits"]
    assert found.index.equals(table.index)
    np.testing.assert_allclose(found["bought_probability_no"] + found["bought_probability_yes"], 1, rtol=1e-6)
    assert ((found["bought"] == "yes") == (found["bought_probability_yes"] >= 0.5)).all()
    assert (found["visits"] > 0).all()
    with_targets = predict(finished.folder, small_table())
    np.testing.assert_array_equal(with_targets["size"], found["size"])


def test_a_row_is_predicted_the_same_alone_and_among_others(finished: Study) -> None:
    table = small_table()
    whole, alone = predict(finished.folder, table), predict(finished.folder, table.iloc[[7]])
    np.testing.assert_allclose(alone["size"], whole["size"].iloc[[7]], rtol=1e-5)


def test_intervals_cover_new_rows_about_as_often_as_promised(finished: Study) -> None:
    fresh = small_table(3000).iloc[300:]
    for level in (0.5, 0.9):
        found = predict(finished.folder, fresh, intervals=level)
        for task in ("size", "visits"):
            low, high = found[f"{task}_low"], found[f"{task}_high"]
            assert (low <= found[task]).all()
            assert (found[task] <= high).all()
            # 60 validation rows: the coverage itself varies by sqrt(level (1 - level) / 60) = 0.065 at most
            assert ((low <= fresh[task]) & (fresh[task] <= high)).mean() == pytest.approx(level, abs=0.2)
        assert (found["visits_low"] >= 0).all()
        assert "bought_low" not in found
    narrow, wide = (predict(finished.folder, fresh, intervals=v) for v in (0.5, 0.9))
    assert ((wide["size_high"] - wide["size_low"]) > (narrow["size_high"] - narrow["size_low"])).all()


def test_conformal_coverage_holds_exactly_on_average() -> None:
    rng = np.random.default_rng(0)
    n, level, trials = 19, 0.8, 4000
    s = np.sort(rng.exponential(size=(trials, n)), axis=1)
    new = rng.exponential(size=trials)
    covered = np.mean([x <= conformal_radius(row, level) for row, x in zip(s, new, strict=True)])
    assert covered == pytest.approx(0.8, abs=0.02)  # (n + 1) * level is whole: coverage is level, no more
    assert conformal_radius(s[0], 0.96) == float("inf")
    assert conformal_radius(np.empty(0), 0.5) == float("inf")


def test_scores_of_each_kind() -> None:
    y, p = np.array([4.0, np.nan, 9.0]), np.array([1.0, 1.0, 4.0])
    np.testing.assert_allclose(conformal_scores(Task("t", Regression()), y, p), [3, 5])
    np.testing.assert_allclose(conformal_scores(Task("t", Count()), y, p), [1, 1])
    assert conformal_scores(Task("t", Binary()), y, p) is None


def test_columns_of_the_rarer_kinds() -> None:
    quantile = _columns(Task("q", Quantile((0.1, 0.5, 0.9))), {"prediction": np.array([[1.0, 2.0, 3.0]])})
    assert {n: v.tolist() for n, v in quantile.items()} == {
        "q": [2.0], "q_quantile_0.1": [1.0], "q_quantile_0.5": [2.0], "q_quantile_0.9": [3.0],
    }  # fmt: skip
    several = {"prediction": np.array([[1, 0], [1, 1]]), "probability": np.array([[0.9, 0.1], [0.8, 0.7]])}
    multilabel = _columns(Task("m", Multilabel(2), classes=("red", "blue")), several)
    assert multilabel["m"].tolist() == ["red", "red;blue"]
    assert multilabel["m_probability_blue"].tolist() == [0.1, 0.7]
    codes = _columns(
        Task("b", Binary(), classes=(3, 7)), {"prediction": np.array([0, 1]), "probability": np.array([0.2, 0.6])}
    )
    assert codes["b"].tolist() == [3, 7]


def test_nothing_stored_can_execute(finished: Study) -> None:
    for file in (finished.folder / "model").iterdir():
        assert file.suffix in {".json", ".safetensors", ".skops"}
        assert not file.read_bytes().startswith(b"\x80")  # how a pickle begins
    about = json.loads((finished.folder / "model" / "model.json").read_text())
    assert sorted(t for part in about["models"] for t in part["tasks"]) == ["bought", "size", "visits"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.drop(columns="b"), "lacks the column 'b'"),
        (lambda t: t.assign(d=1), "has the column 'd'"),
        (lambda t: t.assign(a=np.inf), "'a' has infinite values"),
        (lambda t: t.assign(bought="maybe"), "class 'maybe', unseen in training"),
    ],
)
def test_rows_that_do_not_fit_are_refused(finished: Study, change: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        predict(finished.folder, change(small_table()))  # type: ignore[operator]


def test_a_category_never_seen_is_read_as_unknown(finished: Study) -> None:
    assert np.isfinite(predict(finished.folder, small_table().assign(colour="ultraviolet"))["size"]).all()


def test_coverage_and_folder_are_checked(finished: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="coverage"):
        predict(finished.folder, small_table(), intervals=90)
    with pytest.raises(InputError, match="no model"):
        predict(tmp_path, small_table())


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "conformal.safetensors", "encoder.json"])
def test_a_truncated_file_is_called_damaged(finished: Study, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished.folder / "model", tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(StorageError, match="damaged"):
        predict(tmp_path, small_table())

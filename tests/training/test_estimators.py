"""The scikit-learn estimators: shapes, labels, missing labels, and the company they keep."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from polytask import InputError, MultiTaskClassifier, MultiTaskEstimator, MultiTaskRegressor
from polytask.balancing import make
from polytask.tasks import Binary, Count, Multiclass, Ordinal, Regression

QUICK = {
    "epochs": 20,
    "batch_size": 32,
    "learning_rate": 0.02,
    "width": 64,
    "depth": 1,
    "dropout": 0.0,
    "random_state": 0,
}


@pytest.fixture(scope="module")
def table() -> tuple[pd.DataFrame, pd.DataFrame]:
    random = np.random.default_rng(0)
    X = pd.DataFrame(random.normal(size=(240, 3)), columns=["a", "b", "c"], index=np.arange(1000, 1240))
    side = np.where(X["a"] > 0, "right", "left")
    sort = np.digitize(X["b"], [-0.5, 0.5])
    return X, pd.DataFrame({"side": side, "sort": sort, "sum": 3.0 + X["a"] + 2 * X["c"]}, index=X.index)


def test_mixed_kinds_are_inferred_and_come_back_as_they_went_in(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    model = MultiTaskEstimator(**QUICK).fit(X, Y)
    kinds = [type(task.kind) for task in model.tasks_.values()]
    assert kinds == [Binary, Multiclass, Regression]
    predicted = model.predict(X)
    assert list(predicted.columns) == ["side", "sort", "sum"]
    assert predicted.index.equals(X.index)
    assert (predicted.dtypes == Y.dtypes).all()
    assert (predicted["side"] == Y["side"]).mean() > 0.9
    assert (predicted["sort"] == Y["sort"]).mean() > 0.85
    assert r2_score(Y["sum"], predicted["sum"]) > 0.9
    p = model.predict_proba(X)
    assert p[2] is None
    assert [q.shape for q in p[:2]] == [(240, 2), (240, 3)]
    for q, labels, name in zip(p[:2], model.classes_, Y, strict=False):
        np.testing.assert_allclose(q.sum(1), 1, rtol=1e-12)
        np.testing.assert_array_equal(labels[q.argmax(1)], predicted[name])
    assert model.score(X, Y) == pytest.approx(
        np.mean(
            [
                accuracy_score(Y["side"], predicted["side"]),
                accuracy_score(Y["sort"], predicted["sort"]),
                r2_score(Y["sum"], predicted["sum"]),
            ]
        )
    )


def test_arrays_in_arrays_out(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    numbers = MultiTaskRegressor(**QUICK).fit(X.to_numpy(), np.stack([Y["sum"], -Y["sum"]], axis=1))
    predicted = numbers.predict(X.to_numpy())
    assert predicted.shape == (240, 2)
    assert predicted.dtype == np.float64
    mixed = MultiTaskEstimator(**QUICK).fit(X.to_numpy(), Y.to_numpy())
    assert mixed.predict(X.to_numpy()).dtype == object
    assert set(mixed.predict(X.to_numpy())[:, 0]) == {"left", "right"}
    assert not hasattr(mixed, "feature_names_in_")


def test_one_column_is_one_task(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    model = MultiTaskClassifier(**QUICK).fit(X, Y["sort"])
    assert model.n_outputs_ == 1
    assert list(model.tasks_) == ["sort"]
    assert model.predict(X).shape == (240,)
    assert model.predict_proba(X).shape == (240, 3)
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.score(X, Y["sort"]) == accuracy_score(Y["sort"], model.predict(X))
    assert MultiTaskClassifier(**QUICK).fit(X, Y[["sort"]]).predict(X).shape == (240, 1)


@pytest.mark.parametrize("marker", [np.nan, -1])
def test_the_labels_that_are_known_are_learnt(table: tuple[pd.DataFrame, pd.DataFrame], marker: float) -> None:
    X, _ = table
    labels = np.stack([X["a"] > 0, X["b"] > 0], axis=1).astype(float)
    known = np.random.default_rng(1).random(labels.shape) < 0.5
    model = MultiTaskClassifier(**QUICK).fit(X, np.where(known, labels, marker))
    np.testing.assert_array_equal(np.stack(model.classes_), [[0, 1], [0, 1]])
    assert (model.predict(X) == labels).mean(0).min() > 0.9
    # only known labels count in the score
    assert model.score(X, np.where(known, labels, marker)) == pytest.approx(
        np.mean([(model.predict(X) == labels)[known[:, k], k].mean() for k in range(2)])
    )


def test_rows_without_any_label_change_nothing(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    more = pd.concat([X, 100 + X])
    unlabelled = pd.concat([Y["sum"], Y["sum"] * np.nan])
    with_them = MultiTaskRegressor(**QUICK).fit(more, unlabelled).predict(X)
    without = MultiTaskRegressor(**QUICK).fit(X, Y["sum"]).predict(X)
    np.testing.assert_array_equal(with_them, without)


def test_minus_one_is_a_class_beside_a_single_other_one(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, _ = table
    y = np.where(X["a"] > 0, 1, -1)
    np.testing.assert_array_equal(MultiTaskClassifier(**QUICK).fit(X, y).classes_, [-1, 1])
    y = np.digitize(X["a"], [-0.5, 0.5]) - 1
    np.testing.assert_array_equal(MultiTaskClassifier(**QUICK).fit(X, y).classes_, [0, 1])
    np.testing.assert_array_equal(MultiTaskClassifier(**QUICK, missing_label=None).fit(X, y).classes_, [-1, 0, 1])


def test_minus_one_is_a_number_in_a_regression(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, _ = table
    y = np.where(X["a"] > 0, 5.0, -1.0)
    low = MultiTaskRegressor(**QUICK).fit(X, y).predict(X)[X["a"] < -0.5]
    assert np.abs(low + 1).max() < 1.5


def test_kinds_can_be_told(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    y = pd.DataFrame(
        {
            "grade": pd.Categorical(
                Y["sort"].map({0: "low", 1: "middle", 2: "high"}), ["low", "middle", "high"], ordered=True
            ),
            "visits": np.random.default_rng(2).poisson(np.exp(X["a"])),
        }
    )
    model = MultiTaskEstimator(task_types={"grade": "ordinal", "visits": "count"}, **QUICK).fit(X, y)
    assert isinstance(model.tasks_["grade"].kind, Ordinal)
    assert isinstance(model.tasks_["visits"].kind, Count)
    assert list(model.classes_[0]) == ["low", "middle", "high"]
    predicted = model.predict(X)
    assert predicted["grade"].dtype == y["grade"].dtype
    assert (predicted["visits"] > 0).all()
    assert np.corrcoef(predicted["visits"], np.exp(X["a"]))[0, 1] > 0.8


def test_text_categories_and_missing_values_are_features() -> None:
    random = np.random.default_rng(0)
    X = pd.DataFrame({"colour": random.choice(["red", "green", "blue"], 200), "size": random.normal(size=200)})
    y = pd.DataFrame({"warm": X["colour"] == "red", "double": 2 * X["size"]})
    X.loc[::9, "size"] = np.nan
    model = MultiTaskEstimator(**QUICK).fit(X, y)
    assert model.tasks_["warm"].kind == Binary()
    assert model.predict(X)["warm"].dtype == bool
    assert (model.predict(X)["warm"] == y["warm"]).mean() == 1
    odd = X.assign(colour="violet")
    assert np.isfinite(model.predict(odd)["double"]).all()
    array = MultiTaskEstimator(**QUICK).fit(X.to_numpy(), y).predict(X.to_numpy())
    assert (array["warm"] == y["warm"]).mean() == 1


def test_good_company(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    both = Y[["side", "sort"]]
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), MultiTaskClassifier(**QUICK)).fit(X, both)
    assert list(pipeline[-1].feature_names_in_) == ["a", "b", "c"]
    assert pipeline.score(X, both) > 0.85
    search = GridSearchCV(MultiTaskClassifier(**QUICK), {"balancer": ["equal", {"name": "mgda"}], "width": [16]}, cv=2)
    search.fit(X, both.assign(side=X["a"] > 0).astype(int))
    assert search.best_estimator_.predict(X).shape == (240, 2)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert cross_val_score(MultiTaskRegressor(**QUICK), X, Y[["sum"]], cv=2).min() > 0.5
    # an integer cv makes scikit-learn read y itself, and it refuses text beside numbers and NaN: a splitter is given then
    holes = both.mask(np.arange(240)[:, None] % 5 == [0, 1])
    assert cross_val_score(MultiTaskClassifier(**QUICK), X, holes, cv=KFold(2)).min() > 0.7
    assert cross_val_predict(MultiTaskRegressor(**QUICK), X, Y["sum"], cv=2).shape == (240,)


def test_pickles_and_clones(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    balancer = make("mgda")
    model = MultiTaskEstimator(balancer=balancer, **QUICK).fit(X, Y)
    assert balancer.tasks is None  # parameters are left as they were given
    again = pickle.loads(pickle.dumps(model))
    pd.testing.assert_frame_equal(again.predict(X), model.predict(X))
    fresh = clone(model)
    assert not hasattr(fresh, "model_")
    pd.testing.assert_frame_equal(fresh.fit(X, Y).predict(X), model.predict(X))


def test_the_shared_representation(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    model = MultiTaskEstimator(**QUICK).set_output(transform="pandas").fit(X, Y)
    z = model.transform(X)
    assert list(z.columns) == list(model.get_feature_names_out())
    assert z.index.equals(X.index)
    heads = dict(zip(model.tasks_, model.model_.heads, strict=True))
    with torch.no_grad():
        raw = heads["sum"](torch.from_numpy(z.to_numpy(copy=True)))
    np.testing.assert_allclose(model.tasks_["sum"].kind.decode(raw)["prediction"], model.predict(X)["sum"], rtol=1e-12)


def test_early_stopping_holds_rows_out_and_keeps_the_best_epoch(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    model = MultiTaskEstimator(early_stopping=True, **{**QUICK, "epochs": 30}, patience=3).fit(X, Y)
    scores = model.history_["score"]
    assert model.best_epoch_ == 1 + int(np.argmax(scores))
    assert len(scores) == min(30, model.best_epoch_ + 3)
    assert MultiTaskEstimator(**QUICK).fit(X, Y).best_epoch_ == 20


def test_the_callers_random_numbers_are_left_alone(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    MultiTaskEstimator(**QUICK).fit(X, Y)
    torch.testing.assert_close(torch.rand(4), expected)


def test_sample_weight_in_score(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    model = MultiTaskEstimator(**QUICK).fit(X, Y)
    first = np.arange(240) < 100
    assert model.score(X, Y, sample_weight=first.astype(float)) == pytest.approx(model.score(X[first], Y[first]))


@pytest.mark.parametrize(
    ("y", "options", "sentence"),
    [
        (np.full(240, np.nan), {}, "'y' has no label"),
        (np.ones(240), {"task_types": "binary"}, "'y' has one class only"),
        (np.full(240, 2.5), {"task_types": "regression"}, "'y' has one value only"),
        (np.where(np.arange(240) == 7, np.inf, np.arange(240)), {}, "'y' has 1 infinite"),
        (pd.DataFrame({"up": np.arange(240.0)}), {"task_types": {"down": "count"}}, "'down', which is no column of y"),
        (np.arange(240) / 7, {"task_types": "count"}, "not all 0, 1, 2"),
        (np.arange(240) % 3, {"task_types": "binary"}, "'y' was called binary and has 3 classes"),
        (np.array(["a", "b", "c"] * 80), {"task_types": "ordinal"}, "ordered categorical"),
        (np.array(["a", "b", "c"] * 80), {"task_types": "colour"}, "possible here are"),
        (np.arange(240) % 2, {"balancer": "no such"}, "no balancing method called 'no such'"),
        (np.arange(240) % 2, {"balancer": {"beta": 1}}, "holds its name"),
        (np.zeros((240, 0)), {}, "no column"),
        (np.zeros((240, 2, 2)), {}, "shape"),
    ],
)
def test_bad_input_is_named(table: tuple[pd.DataFrame, pd.DataFrame], y: object, options: dict, sentence: str) -> None:
    X, _ = table
    with pytest.raises(InputError, match=sentence):
        MultiTaskEstimator(**{**QUICK, **options}).fit(X, y)


def test_columns_of_y_are_found_by_name(table: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    X, Y = table
    model = MultiTaskEstimator(**QUICK).fit(X, Y)
    assert model.score(X, Y[["sum", "side", "sort"]]) == model.score(X, Y)
    with pytest.raises(InputError, match="no column 'sort'"):
        model.score(X, Y[["sum", "side"]])
    with pytest.raises(ValueError, match="feature names"):
        model.predict(X.rename(columns={"a": "z"}))


def test_adult_census(shared_data) -> None:
    names = [*"abcdefgh", "race", "sex", "gain", "loss", "hours", "country", "income"]
    frame = pd.read_csv(
        shared_data / "adult" / "adult.data.gz", names=names, skipinitialspace=True, na_values="?", nrows=3000
    )
    Y = frame[["income", "sex", "hours"]].copy()
    Y.loc[::3, "income"] = np.nan
    X = frame.drop(columns=["income", "sex", "hours"])
    model = MultiTaskEstimator(epochs=6, task_types={"hours": "regression"}, random_state=0).fit(X[:2000], Y[:2000])
    truth = frame["income"][2000:]
    assert accuracy_score(truth, model.predict(X[2000:])["income"]) > max((truth == "<=50K").mean(), 0.8)
    assert model.score(X[2000:], Y[2000:]) > 0.55

"""What kind of task a column is, how its labels are encoded, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data import encode_targets, fit_scales, infer_tasks, read_table
from polytask.errors import InputError
from polytask.tasks import Tasks


def one(values, kind=None, name="y"):
    frame = pd.DataFrame({name: values})
    tasks = infer_tasks(frame, [name], {name: kind} if kind else None)
    return tasks[name], encode_targets(frame, tasks)[name]


random = np.random.default_rng(0)
VISITS = random.negative_binomial(0.7, 0.2, 500)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["no", "yes"] * 5, "binary"),
        ([True, False] * 5, "binary"),
        ([1.0, 2.0] * 5, "binary"),
        ([-1, 1] * 5, "binary"),
        ([0.25, 0.75] * 5, "binary"),
        (["a", "b", "c"] * 5, "multiclass"),
        (pd.Categorical(["a", "b", "c"] * 5), "multiclass"),
        ([1, 2, 3] * 5, "multiclass"),
        ([1.0, 2.0, 3.0, np.nan] * 5, "multiclass"),
        (pd.array([1, 2, 3, None] * 5, "Int64"), "multiclass"),
        (VISITS, "count"),
        (VISITS.astype(float), "count"),
        (random.integers(18, 90, 500), "regression"),
        (np.where(VISITS > 2, VISITS * 1000, 0), "regression"),
        (20 - np.minimum(VISITS, 20), "regression"),
        (random.normal(size=50), "regression"),
        ([0.5, 1.0, 1.5] * 5, "regression"),
    ],
)
def test_the_rule(values, kind):
    assert one(values)[0].kind.name == kind


@given(
    codes=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    missing=st.sets(st.integers(0, 29)),
    form=st.sampled_from(["text", "int", "float", "category", "object"]),
)
@settings(deadline=None)
def test_classes_of_any_form_encode_alike(codes, missing, form):
    gone = np.isin(np.arange(len(codes) + 12), sorted(missing - set(range(len(codes), 30))))
    codes = np.array(codes + [0, 1, 2, 3] * 3)
    names = pd.Series(codes).map(dict(enumerate("wxyz"))).astype(object)
    column = {
        "text": names.mask(gone),
        "category": names.mask(gone).astype("category"),
        "int": pd.Series(np.where(gone, -1, codes)),
        "float": pd.Series(codes, dtype=float).mask(gone),
        "object": pd.Series(codes).astype(object).mask(gone, None),
    }[form]
    task, labels = one(column)
    assert labels.dtype == np.int64
    assert labels.tolist() == np.where(gone, -1, codes).tolist()
    assert [task.classes[i] for i in labels if i >= 0] == [
        v for v, g in zip(names if form in ("text", "category") else codes, gone, strict=True) if not g
    ]
    assert Tasks.from_json(json.loads(json.dumps(Tasks([task]).to_json())))["y"].classes == task.classes


def test_binary_labels_are_floats_with_nan():
    task, labels = one(["no", None, "yes", "no", "yes", "no", "yes"])
    assert task.classes == ("no", "yes")
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, [0, np.nan, 1, 0, 1, 0, 1])


def test_minus_one_is_missing_only_beside_codes_from_zero():
    np.testing.assert_array_equal(one([0, 1, -1] * 3)[1], [0, 1, np.nan] * 3)
    assert one([1, 2, -1] * 3)[0].classes == (-1, 1, 2)
    assert one([1, -1] * 3)[0].classes == (-1, 1)


def test_ordinal_follows_numbers_or_the_order_of_a_categorical():
    assert one([3, 10, 7] * 4, "ordinal")[0].classes == (3, 7, 10)
    grades = pd.Categorical(["poor", "good", "fair"] * 4, categories=["poor", "fair", "good"], ordered=True)
    task, labels = one(grades, "ordinal")
    assert task.classes == ("poor", "fair", "good")
    assert labels[:3].tolist() == [0, 2, 1]


def test_multilabel_cells_are_sets():
    task, labels = one(["a;b", "b", "", None, "a", "a | b", "b"], "multilabel")
    assert task.classes == ("a", "b")
    np.testing.assert_array_equal(labels, [[1, 1], [0, 1], [0, 0], [np.nan] * 2, [1, 0], [1, 1], [0, 1]])
    lists = pd.Series([["a", "b"], ["b"], [], None, ["a"], ["b", "a"], ["b"]])
    np.testing.assert_array_equal(one(lists, "multilabel")[1], labels)


def test_scales_come_from_the_rows_given():
    frame = pd.DataFrame({"x": np.arange(100.0) / 3, "n": VISITS[:100]})
    tasks = infer_tasks(frame, ["x", "n"])
    train = fit_scales(frame.iloc[:20], tasks)
    assert train["x"].kind.center == pytest.approx(frame.x[:20].mean(), rel=1e-6)
    assert train["x"].kind.scale == pytest.approx(frame.x[:20].std(ddof=0), rel=1e-6)
    assert train["n"].kind.mean == pytest.approx(frame.n[:20].mean(), rel=1e-6)
    assert tasks["x"].kind.center == pytest.approx(frame.x.mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "kind", "sentence"),
    [
        ([1, 1, 1, 1], None, "'y' is constant: every row is 1"),
        (["a", None, "a"], None, "'y' has only one label value, 'a'"),
        ([np.nan, None, np.nan], None, "'y' has no label: all 3 are missing"),
        ([0.5, np.inf, 1.5, -np.inf], None, "'y' has 2 infinite values"),
        (["a"] * 5 + ["b"] * 2, None, "'y' has only 2 examples of class 'b', too few"),
        ([1, 2, 3] * 3 + [7], None, "'y' has only 1 example of class 7.*another kind"),
        ([f"text {i}" for i in range(90)], None, "'y' holds 90 different texts in 90 rows"),
        (pd.date_range("2020-01-01", periods=9), None, "'y' holds dates"),
        ([1, 2, 3] * 3, "binary", "'y' cannot be of kind binary: it has 3 different values"),
        (["a", "b"] * 3, "regression", "'y' cannot be of kind regression: its labels are not numbers"),
        ([0.5, 1.0, 2.0], "count", "'y' cannot be of kind count"),
        ([-2.0, 1.0, 2.0], "count", "'y' cannot be of kind count"),
        ([1, 2, 3], "rank", "'rank' is no kind of task for the target 'y': choose one of binary, .*ordinal"),
        (["a", "a;b", "a", "a;b", "a;b"], "multilabel", "'y' has the label 'a' in every row"),
        (["a", "b", "a", "a", "c;b", "b"], "multilabel", "'y' has only 1 example of the label 'c'"),
        (["", "", None], "multilabel", "'y' has no label: every set is empty"),
    ],
)
def test_what_is_refused(values, kind, sentence):
    with pytest.raises(InputError, match=sentence):
        one(values, kind)


def test_an_unknown_target_suggests_near_names():
    frame = pd.DataFrame({"Income": [1, 2], "age": [1, 2]})
    with pytest.raises(InputError, match=r"no target column 'incme'; did you mean Income\?"):
        infer_tasks(frame, ["incme"])
    with pytest.raises(InputError, match="the columns are Income, age"):
        infer_tasks(frame, ["zzz"])
    with pytest.raises(InputError, match="'age' is given twice"):
        infer_tasks(frame, ["age", "age"])
    with pytest.raises(InputError, match="kind is given for 'age', which is not one of the targets Income"):
        infer_tasks(frame, ["Income"], {"age": "ordinal"})
    with pytest.raises(InputError, match="two columns called 'age'"):
        infer_tasks(frame.set_axis(["age", "age"], axis=1), ["age"])


def test_a_class_unseen_in_training_is_named():
    frame = pd.DataFrame({"y": ["a", "b", "c"] * 3, "m": ["a;b", "a", "b"] * 3, "x": np.arange(9) / 2})
    tasks = infer_tasks(frame, ["y", "m", "x"], {"m": "multilabel"})
    for column, values, sentence in [
        ("y", ["a", "d"], "'y' has the class 'd', unseen in training, whose classes are 'a', 'b', 'c'"),
        ("m", ["a", "z"], "'m' has the label 'z', unseen in training"),
        ("x", ["1", "low"], "'x' has labels that are not numbers, such as '1'"),
        ("x", [1.0, np.inf], "'x' has 1 infinite values"),
    ]:
        new = frame.iloc[:2].assign(**{column: values})
        with pytest.raises(InputError, match=sentence):
            encode_targets(new, tasks)
    with pytest.raises(InputError, match="no target column 'y'"):
        encode_targets(frame[["m", "x"]], tasks)


def test_classes_are_recognised_whatever_the_file_made_of_them():
    tasks = infer_tasks(pd.DataFrame({"y": [1, 2, 3] * 3}), ["y"])
    for values in (["3", "1"], [3.0, 1.0], pd.Categorical([3, 1])):
        assert encode_targets(pd.DataFrame({"y": values}), tasks)["y"].tolist() == [2, 0]
    assert encode_targets(pd.DataFrame({"y": [None, np.nan]}), tasks)["y"].tolist() == [-1, -1]


def test_real_targets(shared_data):
    reviews = read_table(shared_data / "clothing_reviews" / "reviews.csv.gz")
    targets = ["Rating", "Recommended IND", "Department Name", "Positive Feedback Count"]
    tasks = infer_tasks(reviews, targets, {"Rating": "ordinal"})
    assert [t.kind.name for t in tasks.values()] == ["ordinal", "binary", "multiclass", "count"]
    assert tasks["Rating"].classes == (1, 2, 3, 4, 5)
    labels = encode_targets(reviews, tasks)
    assert (labels["Department Name"] < 0).sum() == reviews["Department Name"].isna().sum() > 0
    assert tasks["Positive Feedback Count"].kind.mean == pytest.approx(
        reviews["Positive Feedback Count"].mean(), rel=1e-6
    )
    students = read_table(shared_data / "student_performance" / "student-mat.csv")
    kinds = {n: t.kind.name for n, t in infer_tasks(students, ["G3", "absences", "romantic", "studytime"]).items()}
    assert kinds == {"G3": "regression", "absences": "count", "romantic": "binary", "studytime": "multiclass"}

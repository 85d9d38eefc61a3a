"""Encoding: nothing is lost, nothing leaks, everything can be stored and read back, exactly."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest

from polytask.data import TableEncoder, read_table
from polytask.data.vectorizer import TRUSTED_TYPES
from polytask.errors import InputError, StorageError


def table(n=300, seed=0):
    random = np.random.default_rng(seed)
    words = np.array(["the", "a", "red", "blue", "dress", "fits", "runs", "small", "large", "soft", "wool", "summer"])
    return pd.DataFrame(
        {
            "size": random.lognormal(size=n),
            "holes": np.where(random.random(n) < 0.2, np.nan, random.normal(5, 3, n)),
            "flag": random.random(n) < 0.3,
            "colour": random.choice(["red", "green", "blue", None], n),
            "id": [f"item-{i:05d}" for i in range(n)],
            "review": [" ".join(random.choice(words, 8)) for _ in range(n)],
            "day": pd.to_datetime("2021-03-01") + pd.to_timedelta(random.integers(0, 700, n), unit="D"),
            "constant": "x",
            "nothing": np.nan,
        }
    )


FRAME = table()


@pytest.fixture(scope="module")
def encoder():
    return TableEncoder().fit(FRAME)


def test_every_column_finds_its_place(encoder):
    spec = encoder.spec
    assert spec["columns"] == list(FRAME.columns)
    assert spec["dropped"] == ["constant", "nothing"]
    assert spec["features"] == {"numeric": 3, "categorical": 1, "text": 2, "date": 1}
    assert (spec["categorical"], spec["cardinalities"]) == (["colour"], [4])
    assert [n for n, role in zip(spec["numeric"], spec["numeric_role"], strict=True) if role == "missing"] == [
        "holes is missing"
    ]
    assert spec["numeric_role"].count("text") <= 64
    assert json.loads(json.dumps(spec)) == spec


def test_numbers_are_standardised_and_missing_ones_marked(encoder):
    inputs, names = encoder.transform(FRAME), encoder.spec["numeric"]
    assert inputs.numeric.dtype == np.float32
    assert inputs.categorical.dtype == np.int64
    assert np.isfinite(inputs.numeric).all()
    column = dict(zip(names, inputs.numeric.T, strict=True))
    for name in ("size", "flag", "day_total_seconds"):
        assert column[name].mean() == pytest.approx(0, abs=1e-3)
        assert column[name].std() == pytest.approx(1, rel=1e-3)
    gone = FRAME["holes"].isna().to_numpy()
    np.testing.assert_array_equal(column["holes is missing"], gone)
    assert np.unique(column["holes"][gone]) == pytest.approx(
        (FRAME["holes"].median() - FRAME["holes"].mean()) / FRAME["holes"].std(ddof=0), rel=1e-3
    )
    # standardising is affine and increasing: the order of values survives
    assert (np.argsort(column["size"]) == np.argsort(FRAME["size"])).all()


def test_codes_name_the_classes_and_zero_is_missing_or_unknown(encoder):
    codes = encoder.transform(FRAME).categorical[:, 0]
    assert pd.Series(codes).groupby(FRAME["colour"].fillna("none")).nunique().eq(1).all()
    assert set(codes[FRAME["colour"].isna()]) == {0}
    assert set(codes[FRAME["colour"].notna()]) == {1, 2, 3}
    assert encoder.transform(FRAME.assign(colour="violet")).categorical.sum() == 0
    assert encoder.transform(FRAME.assign(colour=None)).categorical.sum() == 0


def test_edges_ascend_and_common_values_get_one_each():
    frame = pd.DataFrame(
        {"gain": np.r_[np.zeros(900), np.arange(1, 101)], "plain": np.random.default_rng(0).normal(size=1000)}
    )
    encoder = TableEncoder().fit(frame)
    edges = dict(zip(encoder.spec["numeric"], encoder.spec["bin_edges"], strict=True))
    inputs = encoder.transform(frame).numeric
    for j, name in enumerate(("gain", "plain")):
        assert (np.diff(edges[name]) > 0).all()
        assert (edges[name][0], edges[name][-1]) == (inputs[:, j].min(), inputs[:, j].max())
    # nine tenths of the rows are one value, and still most bins are spent on the others
    assert len(edges["gain"]) > 10
    share, _ = np.histogram(inputs[:, 1], edges["plain"])
    assert share.max() <= 2 * share.min()


@pytest.mark.parametrize("seed", [1, 2])
def test_stored_and_read_back_it_encodes_the_same(tmp_path, seed):
    folder = tmp_path / "encoder"
    random = np.random.default_rng(seed)
    frame = table(60, seed)[random.permutation(FRAME.columns)].sample(frac=1, random_state=seed)
    first = TableEncoder().fit(frame)
    first.save(folder)
    again = TableEncoder.load(folder)
    new = table(40, seed + 1)
    for rows in (frame, new):
        a, b = first.transform(rows), again.transform(rows)
        np.testing.assert_array_equal(a.numeric, b.numeric)
        np.testing.assert_array_equal(a.categorical, b.categorical)
    assert again.spec == first.spec
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.json", "encoder.skops"]


def test_the_order_and_the_types_of_columns_do_not_matter(encoder, tmp_path):
    FRAME.to_csv(tmp_path / "t.csv", index=False)
    shuffled = read_table(tmp_path / "t.csv")[list(FRAME.columns[::-1])]
    a, b = encoder.transform(FRAME), encoder.transform(shuffled)
    np.testing.assert_allclose(a.numeric, b.numeric, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(a.categorical, b.categorical)
    # one row: its missing text and missing number must not change what the columns are
    row = FRAME.iloc[[0]].assign(review=None, holes=None, day=pd.NaT)
    assert encoder.transform(row).numeric.shape == (1, a.numeric.shape[1])


def test_rows_are_encoded_one_by_one(encoder):
    whole, part = encoder.transform(FRAME), encoder.transform(FRAME.iloc[100:150])
    np.testing.assert_allclose(whole.numeric[100:150], part.numeric, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(whole.categorical[100:150], part.categorical)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.drop(columns=["size", "day"]), "lacks the columns 'size', 'day', which the model was trained on"),
        (lambda f: f.assign(extra=1), "has the column 'extra', which the model was not trained on"),
        (lambda f: f.assign(size=np.inf), "the feature column 'size' has infinite values"),
        (lambda f: f.assign(size="large"), "'size' held numbers in training and now holds 'large'"),
        (lambda f: pd.concat([f, f[["size"]]], axis=1), "two columns called 'size'"),
    ],
)
def test_tables_that_do_not_fit(encoder, change, sentence):
    with pytest.raises(InputError, match=sentence):
        encoder.transform(change(FRAME))


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (FRAME.assign(size=-np.inf), "the feature column 'size' has infinite values"),
        (FRAME[["constant", "nothing"]], "no feature column varies: constant, nothing"),
        (FRAME[[]], "no feature columns"),
        (FRAME.iloc[:0], "no rows to fit"),
        (pd.concat([FRAME, FRAME[["size"]]], axis=1), "two columns called 'size'"),
    ],
)
def test_tables_that_cannot_be_fitted(frame, sentence):
    with pytest.raises(InputError, match=sentence):
        TableEncoder().fit(frame)


def test_an_encoder_must_be_fitted_first():
    with pytest.raises(InputError, match="not been fitted"):
        TableEncoder().transform(FRAME)


def test_foreign_types_and_damaged_files_are_refused(encoder, tmp_path):
    import skops.io
    from skrub import GapEncoder

    encoder.save(tmp_path)
    whole = (tmp_path / "encoder.skops").read_bytes()
    assert set(skops.io.get_untrusted_types(data=whole)) <= TRUSTED_TYPES
    (tmp_path / "encoder.skops").write_bytes(skops.io.dumps(GapEncoder()))
    with pytest.raises(StorageError, match=r"holds the type skrub\._gap_encoder\.GapEncoder, which is not on the list"):
        TableEncoder.load(tmp_path)
    for content in (whole[: len(whole) // 2], pickle.dumps(encoder), b""):
        (tmp_path / "encoder.skops").write_bytes(content)
        with pytest.raises(StorageError, match=r"encoder\.skops is damaged"):
            TableEncoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(StorageError, match=r"encoder\.json is damaged"):
        TableEncoder.load(tmp_path)
    (tmp_path / "encoder.json").unlink()
    with pytest.raises(StorageError, match=r"encoder\.json cannot be read"):
        TableEncoder.load(tmp_path)


def test_tiny_and_odd_tables():
    for frame in (
        pd.DataFrame({"x": [1.0, 2.0]}),
        pd.DataFrame({"s": ["a", "b", "a", "b"]}),
        pd.DataFrame({0: [1, 2, 3], 1: ["u", "v", "v"]}),
        pd.DataFrame({"i": pd.array([1, None, 3], "Int64"), "b": pd.array([True, None, False], "boolean")}),
        pd.DataFrame({"c": pd.Categorical(["a", "b", "b"]), "mixed": ["1", 2, None]}),
        pd.DataFrame({"punctuation": [f"{'!' * (i % 90 + 1)}" for i in range(200)]}),
    ):
        inputs = TableEncoder().fit(frame).transform(frame)
        assert len(inputs) == len(frame)
        assert np.isfinite(inputs.numeric).all()


def test_real_tables(shared_data):
    reviews = read_table(shared_data / "clothing_reviews" / "reviews.csv.gz").iloc[:3000]
    encoder = TableEncoder().fit(reviews[["Clothing ID", "Age", "Title", "Review Text", "Division Name"]])
    assert encoder.spec["features"] == {"numeric": 2, "categorical": 1, "text": 2, "date": 0}
    inputs = encoder.transform(reviews[encoder.columns])
    # the text says what the stars say: a least-squares fit on its coordinates explains a good part of the rating
    X = np.c_[inputs.numeric, np.ones(len(inputs))]
    y = reviews["Rating"].to_numpy()
    fit = X @ np.linalg.lstsq(X[:2000], y[:2000], rcond=None)[0]
    assert np.corrcoef(fit[2000:], y[2000:])[0, 1] > 0.4
    river = read_table(shared_data / "multi_target" / "rf1_train.csv.gz").iloc[:, :-8]
    spec = TableEncoder().fit(river).spec
    assert spec["features"]["numeric"] == 64
    assert "missing" in spec["numeric_role"]

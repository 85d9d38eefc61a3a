"""Splits: parts that are disjoint, balanced, reproducible, and never cut a group or run back in time."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data import infer_tasks, read_table, split_rows
from polytask.errors import InputError


def table(n=400, seed=0):
    random = np.random.default_rng(seed)
    z = random.normal(size=n)
    return pd.DataFrame(
        {
            "rare": np.where(z > np.quantile(z, 0.96), "yes", "no"),
            "kind": random.choice(["a", "b", "c", None], n, p=[0.6, 0.28, 0.08, 0.04]),
            "amount": np.where(random.random(n) < 0.3, np.nan, z + random.normal(size=n)),
            "group": random.integers(0, n // 5, n),
            "day": pd.to_datetime("2020-01-01") + pd.to_timedelta(random.integers(0, 90, n), unit="D"),
        }
    )


FRAME = table()
TASKS = infer_tasks(FRAME, ["rare", "kind", "amount"])
LABELLED = FRAME[["rare", "kind", "amount"]].notna().any(axis=1)


def parts(split):
    return split.train, split.validation, split.test


@given(
    seed=st.integers(0, 10_000), n=st.integers(150, 300), how=st.sampled_from([{}, {"by": "group"}, {"by_time": "day"}])
)
@settings(max_examples=40, deadline=None)
def test_the_parts_are_disjoint_and_whole(seed, n, how):
    frame = table(n, seed % 7)
    split = split_rows(frame, infer_tasks(frame, ["amount"]), seed=seed, **how)
    rows = np.concatenate(parts(split))
    labelled = np.flatnonzero(frame["amount"].notna())
    np.testing.assert_array_equal(np.sort(rows), labelled)
    assert all((np.diff(p) > 0).all() for p in parts(split))
    shares = np.array([len(p) for p in parts(split)]) / len(labelled)
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.05)
    assert f"{len(frame) - len(labelled)} rows without any label left out" in split.how


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_every_class_bin_and_missing_label_is_spread_in_proportion(seed):
    split = split_rows(FRAME, TASKS, seed=seed)
    quintile = pd.qcut(FRAME["amount"], 5, labels=False)
    for column in (FRAME["rare"], FRAME["kind"], FRAME["kind"].isna(), FRAME["amount"].isna(), quintile):
        whole = column.value_counts()
        for rows, share in zip(parts(split), (0.6, 0.2, 0.2), strict=True):
            found = column.iloc[rows].value_counts().reindex(whole.index).fillna(0)
            assert (abs(found - share * whole) <= np.maximum(2.5, 0.06 * whole)).all(), (column.name, found, whole)


@given(counts=st.lists(st.integers(3, 9), min_size=2, max_size=6), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_three_examples_are_enough_for_every_part(counts, seed):
    frame = pd.DataFrame({"y": np.repeat(list("abcdef")[: len(counts)], counts)})
    split = split_rows(frame, infer_tasks(frame, ["y"]), seed=seed)
    for rows in parts(split):
        assert set(frame["y"].iloc[rows]) == set(frame["y"])


def test_the_seed_decides():
    for how in ({}, {"by": "group"}):
        a, b, c = (split_rows(FRAME, TASKS, seed=s, **how) for s in (1, 1, 2))
        assert all(np.array_equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))
        assert not np.array_equal(a.test, c.test)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_no_group_is_cut_and_labels_stay_balanced(seed):
    split = split_rows(FRAME, TASKS, seed=seed, by="group")
    groups = [set(FRAME["group"].iloc[p]) for p in parts(split)]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    rates = [(FRAME["rare"].iloc[p] == "yes").mean() for p in parts(split)]
    np.testing.assert_allclose(rates, 0.04, atol=0.03)


@pytest.mark.parametrize("form", ["date", "text", "number"])
def test_time_only_runs_forward(form):
    day = FRAME["day"]
    column = {"date": day, "text": day.dt.strftime("%Y-%m-%d"), "number": (day - day.min()).dt.days}[form]
    split = split_rows(FRAME.assign(when=column), TASKS, by_time="when")
    train, validation, test = (day.iloc[p] for p in parts(split))
    assert train.max() < validation.min() <= validation.max() < test.min()


def test_unequal_times_still_make_three_parts():
    frame = pd.DataFrame({"x": np.arange(100) / 7, "t": [0] * 90 + [1] * 5 + [2] * 5})
    split = split_rows(frame, infer_tasks(frame, ["x"]), by_time="t")
    assert split.sizes == {"train": 90, "validation": 5, "test": 5}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"by": "grupo"}, "no group column 'grupo'; did you mean group"),
        ({"by_time": "dya"}, "no time column 'dya'; did you mean day"),
        ({"by": "rare"}, "'rare' has 2 groups, too few"),
        ({"by": "kind"}, f"'kind' has {(FRAME.kind.isna() & LABELLED).sum()} missing values"),
        ({"by_time": "kind"}, "'kind' holds '[abc]', which is neither a date nor a number"),
        ({"by_time": "amount"}, f"'amount' has {(FRAME.amount.isna() & LABELLED).sum()} missing values"),
        ({"by": "group", "by_time": "day"}, "either by the groups of 'group' or by the time 'day'"),
        ({"fractions": (0.5, 0.5, 0.0)}, "three positive numbers adding up to 1"),
        ({"fractions": (0.5, 0.5, 0.5)}, "three positive numbers adding up to 1"),
    ],
)
def test_what_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        split_rows(FRAME, TASKS, **options)


def test_a_part_without_what_a_task_needs_is_named():
    frame = pd.DataFrame({"y": ["a"] * 80 + ["b"] * 20, "z": np.r_[np.arange(80) / 3, [np.nan] * 20], "t": range(100)})
    with pytest.raises(
        InputError, match="training part has labels of one value only of the target 'y': choose other fractions"
    ):
        split_rows(frame, infer_tasks(frame, ["y"]), by_time="t")
    frame["y"] = ["a", "b"] * 50
    with pytest.raises(InputError, match="test part has no label of the target 'z'"):
        split_rows(frame, infer_tasks(frame, ["y", "z"]), by_time="t")
    frame["y"] = ["a", "b"] * 40 + ["c", "a"] * 10
    with pytest.raises(InputError, match="training part has no example of class 'c' of the target 'y'"):
        split_rows(frame, infer_tasks(frame, ["y"]), by_time="t")


def test_multilabel_targets_are_stratified():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"y": [";".join(np.array(["a", "b", "c"])[random.random(3) < [0.5, 0.2, 0.03]]) for _ in range(500)]}
    )
    split = split_rows(frame, infer_tasks(frame, ["y"], {"y": "multilabel"}))
    with_c = frame["y"].str.contains("c")
    assert [int(with_c.iloc[p].sum()) for p in parts(split)] == pytest.approx(
        [0.6 * with_c.sum(), 0.2 * with_c.sum(), 0.2 * with_c.sum()], abs=1.5
    )


def test_real_rows(shared_data):
    adult = read_table(shared_data / "adult" / "adult.data.gz", columns=[f"c{i}" for i in range(15)])
    tasks = infer_tasks(adult, ["c14", "c5", "c12"])
    split = split_rows(adult, tasks)
    assert split.sizes == pytest.approx({"train": 19537, "validation": 6512, "test": 6512}, abs=12)
    assert tasks["c5"].kind.n_classes == 7
    rates = [(adult["c14"].iloc[p] == ">50K").mean() for p in parts(split)]
    np.testing.assert_allclose(rates, 0.2408, atol=0.001)
    armed_forces = adult["c5"] == "Married-AF-spouse"
    assert [int(armed_forces.iloc[p].sum()) for p in parts(split)] == pytest.approx([13.8, 4.6, 4.6], abs=1)

"""The table of the demonstration: what its text says of it is so."""

import builtins

import numpy as np
import pytest

from polytask.data import demo_table, encode_targets, infer_tasks, split_rows
from polytask.errors import MissingExtraError


def test_the_text_tells_the_truth():
    demo = demo_table()
    frame = demo.frame
    assert len(frame) == 5638
    assert "5,638 people" in demo.text
    tasks = infer_tasks(frame, demo.targets, demo.kinds)
    assert [t.kind.name for t in tasks.values()] == ["count", "binary", "binary", "regression"]
    labels = encode_targets(frame, tasks)
    missing = {name: np.isnan(v).mean() for name, v in labels.items()}
    assert missing["doctor_visits"] == missing["any_spending"] == 0
    assert 0.02 < missing["limited"] < 0.05
    assert 0.2 < missing["health_index"] < 0.3
    unknown = frame["health_index"].isna().groupby(frame["site"]).mean()
    assert len(unknown) == 6
    assert (unknown == 1).sum() == 1
    assert (unknown < 0.05).sum() == 5


def test_no_family_is_cut_and_no_feature_repeats_a_target():
    demo = demo_table()
    split = split_rows(demo.frame, infer_tasks(demo.frame, demo.targets), by=demo.groups)
    families = [set(demo.frame[demo.groups].iloc[p]) for p in (split.train, split.validation, split.test)]
    assert not families[0] & families[1] | families[0] & families[2] | families[1] & families[2]
    assert demo.frame[demo.groups].nunique() > 1000
    features = demo.frame.drop(columns=[*demo.targets, demo.groups]).select_dtypes("number")
    correlation = features.apply(lambda x: demo.frame[list(demo.targets)].corrwith(x).abs())
    assert correlation.max().max() < 0.6


def test_without_statsmodels_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("statsmodels"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'polytask\[demo\]'"):
        demo_table()

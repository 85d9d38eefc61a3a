"""The network for tables: its encodings keep to their formulas, it can be rebuilt, and it learns."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data import TableEncoder, encode_targets, infer_tasks, read_table, split_rows
from polytask.errors import InputError
from polytask.models import tabular_model
from polytask.models.tabular import Embeddings, Periodic, PiecewiseLinear
from polytask.tasks import Binary, Count, Multiclass, Multilabel, Ordinal, Quantile, Regression, Task, Tasks

SPEC = {"bin_edges": [[-1.0, 0.0, 2.0], [], [0.0, 0.5, 1.0, 4.0]], "cardinalities": [3, 5]}
TASKS = Tasks(
    [
        Task("dotted.name", Regression(2.0, 3.0)),
        Task("b", Binary()),
        Task("m", Multiclass(4)),
        Task("l", Multilabel(3)),
        Task("q", Quantile()),
        Task("c", Count(2.0)),
        Task("o", Ordinal(5)),
    ]
)


def rows(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, c, (n,), generator=g) for c in SPEC["cardinalities"]], 1)
    return {"numeric": torch.randn(n, 3, generator=g), "categorical": codes}


finite = st.floats(-1e4, 1e4, width=32)


@given(
    st.lists(finite, min_size=2, max_size=8, unique_by=lambda v: round(v, 1)), st.lists(finite, min_size=1, max_size=20)
)
@settings(deadline=None)
def test_piecewise_linear_inverts_inside_the_bins(edges, values):
    edges = sorted(edges)
    x = torch.tensor(values, dtype=torch.float32)
    e = PiecewiseLinear([edges])(x[:, None])
    assert e.shape == (len(values), len(edges) - 1)
    # the shares of the bins, weighted by their widths, add up to the way from the first edge, up to the last
    way = e.double() @ torch.diff(torch.tensor(edges)).double()
    expected = x.double().clamp(edges[0], edges[-1]) - edges[0]
    torch.testing.assert_close(way, expected, rtol=1e-4, atol=1e-5 * (edges[-1] - edges[0]) + 1e-30)
    assert (e[:, :-1] >= e[:, 1:]).all()


def test_columns_without_bins_pass():
    x = rows()["numeric"]
    e = PiecewiseLinear(SPEC["bin_edges"])(x)
    assert e.shape == (16, 2 + 3 + 1)
    torch.testing.assert_close(e[:, -1], x[:, 1])


def test_periodic_keeps_columns_apart_and_repeats():
    torch.manual_seed(0)
    encode = Periodic(3, frequencies=4, out=5)
    x = rows()["numeric"]
    changed = x.clone()
    changed[:, 1] += 1
    moved = (encode(x) != encode(changed)).reshape(16, 3, 5).any(-1).any(0)
    assert moved.tolist() == [False, True, False]
    with torch.no_grad():
        encode.c.fill_(0.5)
    torch.testing.assert_close(encode(x), encode(x + 2), rtol=1e-4, atol=1e-5)


def test_unknown_codes_add_nothing_and_columns_do_not_share():
    embed = Embeddings([3, 5], size=4)
    assert (embed(torch.zeros(2, 2, dtype=torch.int64)) == 0).all()
    one = embed(torch.tensor([[2, 0], [0, 2]])).reshape(2, 2, 4)
    assert (one[0, 1] == 0).all()
    assert not torch.equal(one[0, 0], one[1, 1])


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("blocks", ["resnet", "mlp"])
@pytest.mark.parametrize("numeric", ["piecewise_linear", "periodic"])
def test_every_form_serves_every_kind_and_is_rebuilt_from_its_options(numeric, blocks, head):
    before = torch.random.get_rng_state()
    model = tabular_model(SPEC, TASKS, width=24, numeric=numeric, blocks=blocks, head=head, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    outputs = model(rows())
    assert {n: o.shape for n, o in outputs.items()} == {n: (16, t.kind.output_size) for n, t in TASKS.items()}
    sum(o.square().sum() for o in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = tabular_model(
        json.loads(json.dumps(SPEC)), Tasks.from_json(TASKS.to_json()), **json.loads(json.dumps(model.options))
    )
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(
        next(twin.parameters()), next(tabular_model(SPEC, TASKS, **{**model.options, "seed": 4}).parameters())
    )


@pytest.mark.parametrize(
    "spec", [{"bin_edges": [], "cardinalities": [3]}, {"bin_edges": [[0.0, 1.0]], "cardinalities": []}]
)
@pytest.mark.parametrize("numeric", ["piecewise_linear", "periodic"])
def test_only_numbers_or_only_categories(spec, numeric):
    inputs = {
        "numeric": torch.rand(4, len(spec["bin_edges"])),
        "categorical": torch.zeros(4, len(spec["cardinalities"]), dtype=torch.int64),
    }
    outputs = tabular_model(spec, TASKS, width=8, numeric=numeric)(inputs)
    assert all(o.isfinite().all() for o in outputs.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"numeric": "fourier"}, "numeric of a tabular model is piecewise_linear or periodic, not 'fourier'"),
        ({"blocks": "cnn"}, "blocks of a tabular model is resnet or mlp, not 'cnn'"),
        ({"width": 0}, "at least 1, not 0 and"),
        ({"dropout": 1.0}, r"lies in \[0, 1\), not at 1.0"),
        ({"spec": {"bin_edges": [], "cardinalities": []}}, "at least one numeric or categorical column"),
    ],
)
def test_options_outside_their_range(options, sentence):
    with pytest.raises(InputError, match=sentence):
        tabular_model(options.pop("spec", SPEC), TASKS, **options)


def test_examples_do_not_see_one_another():
    model = tabular_model(SPEC, TASKS, width=24).eval()
    inputs = rows()
    alone = model({k: v[:1] for k, v in inputs.items()})
    together = model(inputs)
    for name in TASKS:
        torch.testing.assert_close(alone[name], together[name][:1], rtol=1e-4, atol=1e-6)


def test_it_learns_real_diagnoses(shared_data):
    frame = pd.concat(
        read_table(shared_data / "heart_disease" / f"processed.{h}.data") for h in ("cleveland", "hungarian", "va")
    )
    frame = frame.reset_index(drop=True).assign(ill=lambda f: (f["target"] > 0).astype(int))
    tasks = infer_tasks(frame, ["ill", "thalach"])
    split = split_rows(frame, tasks)
    features = frame.drop(columns=["ill", "thalach", "target"])
    encoder = TableEncoder().fit(features.iloc[split.train])
    torch.manual_seed(0)
    model = tabular_model(encoder.spec, tasks, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = encoder.transform(features.iloc[split.train]).tensors()
    targets = {k: torch.from_numpy(v) for k, v in encode_targets(frame.iloc[split.train], tasks).items()}
    for _ in range(60):
        optimizer.zero_grad()
        sum(tasks.losses(model(inputs), targets).values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        decoded = tasks.decode(model(encoder.transform(features.iloc[split.test]).tensors()))
    truth = encode_targets(frame.iloc[split.test], tasks)
    auc = tasks["ill"].metrics[0](truth["ill"], {k: v.numpy() for k, v in decoded["ill"].items()})
    known = ~np.isnan(truth["thalach"])
    error = np.sqrt(np.mean((truth["thalach"][known] - decoded["thalach"]["prediction"].numpy()[known]) ** 2))
    assert auc > 0.8
    assert error < np.nanstd(truth["thalach"])

"""Rare conversions: the class map, routing, and the real table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polytask.balancing import backward, make
from polytask.errors import InputError
from polytask.recipes import run_recipe
from polytask.recipes.advertising.clicks import census, generated
from polytask.recipes.advertising.conversion_types import History, rare_types, undo_down_sampling
from polytask.recipes.advertising.rare_conversions import Ranker, RareConversionsRecipe, routed_losses


@pytest.fixture(scope="module")
def clicks():
    return generated(2000, 0.3, seed=0)


def test_types_are_rare_below_tau_and_the_smoothing_is_the_stated_one():
    # (k + 1) / (n + 100) = 0.01 exactly at n = 1900, k = 19
    history = {"below": History(1900, 18), "at": History(1900, 19), "above": History(1900, 20)}
    assert rare_types(history) == {"below": True, "at": False, "above": False}
    assert rare_types(history) == rare_types(dict(reversed(history.items())))
    assert rare_types(history, tau=0.02) == {"below": True, "at": True, "above": True}


def test_types_with_few_clicks_follow_their_parent_or_count_as_rare():
    history = {
        "big": History(50_000, 5_000, "shop"),
        "new": History(999, 0, "shop"),
        "new-rare": History(10, 5, "cars"),
        "alone": History(999, 900),
        "judged": History(1000, 0, "shop"),
    }
    assert rare_types(history) == {"big": False, "new": False, "new-rare": True, "alone": True, "judged": True}


@given(st.integers(1000, 10**6), st.floats(0, 0.03), st.booleans())
def test_hysteresis_keeps_the_class_between_the_bounds(n, rate, was_rare):
    history = {"c": History(n, int(rate * n))}
    smoothed = (int(rate * n) + 1) / (n + 100)
    found = rare_types(history, before={"c": was_rare})["c"]
    if 0.008 <= smoothed < 0.012:
        assert found == was_rare
    else:
        assert found == (smoothed < 0.01)


def test_impossible_counts_name_the_type():
    with pytest.raises(InputError, match=r"'buy' has 3 conversions of 2 clicks"):
        rare_types({"buy": History(2, 3)})


def test_undoing_down_sampling_is_nothing_at_one_and_restores_the_odds():
    p = np.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(undo_down_sampling(p, 1.0), p, rtol=1e-15)
    corrected = undo_down_sampling(p, 0.1)
    np.testing.assert_allclose(corrected / (1 - corrected), 0.1 * p / (1 - p), rtol=1e-12)


def test_a_batch_of_frequent_clicks_moves_no_rare_tower(clicks):
    sample = clicks["train"]
    model = Ranker(sample)
    soft_only = sample.rows((~sample.hard).nonzero()[:64, 0])
    losses = routed_losses(model, soft_only)
    assert set(losses) == {"soft"}
    backward(losses, balancer=make("capped_frequency"))
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.towers["hard"].parameters())
    assert all(bool(p.grad.any()) for p in model.bottom.parameters())


def test_the_residual_tower_does_not_train_the_frequent_one(clicks):
    sample = clicks["train"]
    model = Ranker(sample, residual=True)
    rates = [float(sample.y[sample.hard == hard].mean()) for hard in (False, True)]
    assert model.delta.item() == pytest.approx(
        np.log(rates[1] / (1 - rates[1])) - np.log(rates[0] / (1 - rates[0])), rel=1e-4
    )
    routed_losses(model, sample.rows(sample.hard.nonzero()[:64, 0]))["hard"].backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.towers["soft"].parameters())
    assert float(model.delta.grad) != 0


def test_without_weight_on_the_rare_tower_the_model_is_one_of_frequent_clicks_only(clicks):
    batch = clicks["train"].rows(torch.arange(256))
    torch.manual_seed(0)
    model = Ranker(clicks["train"])
    losses = routed_losses(model, batch)
    (losses["soft"] + 0.0 * losses["hard"]).backward()
    both = [p.grad.clone() for p in model.bottom.parameters()]
    model.zero_grad()
    share = float((~batch.hard).float().mean())
    alone = batch.rows((~batch.hard).nonzero()[:, 0])
    (share * routed_losses(model, alone)["soft"]).backward()
    for a, p in zip(both, model.bottom.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-7)


def test_the_order_of_rows_does_not_matter(clicks):
    batch = clicks["train"].rows(torch.arange(256))
    model = Ranker(clicks["train"])
    plain, mixed = routed_losses(model, batch), routed_losses(model, batch.rows(torch.randperm(256)))
    for name, loss in plain.items():
        torch.testing.assert_close(loss, mixed[name], rtol=1e-5, atol=0)


def test_weights_are_inverse_frequencies_up_to_the_cap():
    losses = torch.ones(3, dtype=torch.float64)
    by_name = make("capped_frequency", counts={"a": 900, "b": 300, "c": 10}, cap=10.0)
    by_name.bind(["a", "b", "c"])
    assert by_name.weights(losses).tolist() == [1.0, 3.0, 10.0]
    by_name.bind(["c", "a"])
    assert by_name.weights(losses[:2]).tolist() == [10.0, 1.0]
    assert make("rare_conversions", counts=[900, 300, 10]).weights(losses).tolist() == [1.0, 3.0, 10.0]
    for options, said in (({"counts": [1, 0]}, "counts above 0"), ({"cap": 0.5}, "cap of at least 1")):
        with pytest.raises(InputError, match=said):
            make("capped_frequency", **options)
    with pytest.raises(InputError, match="2 counts for 3 tasks"):
        make("capped_frequency", counts=[1, 2]).weights(losses)
    with pytest.raises(InputError, match="no count for the task 'c'"):
        make("capped_frequency", counts={"a": 1, "b": 2, "z": 3}).bind(["a", "b", "c"])


def test_generated_clicks_are_rare_where_they_should_be():
    sample = generated(20_000, 0.3, seed=1)["train"]
    assert 0.4 < float(sample.hard.float().mean()) < 0.6
    assert float(sample.y[sample.hard].mean()) < 0.03 < 0.05 < float(sample.y[~sample.hard].mean())


def test_the_real_table_is_split_by_year_and_its_rare_types_are_rare(shared_data):
    parts = census(str(shared_data / "census_income_kdd"))
    assert sum(map(len, parts.values())) == 99_762 - 49_816 // 5
    for part in parts.values():
        rare, frequent = part.y[part.hard].mean(), part.y[~part.hard].mean()
        assert float(rare) < 0.02 < 0.05 < float(frequent)
        assert bool((part.categorical >= 0).all())
        assert bool((part.categorical.amax(0) < torch.tensor(part.sizes)).all())
        assert bool(torch.isfinite(part.numeric).all())


def test_the_recipe_runs_on_the_real_table_and_names_a_missing_file(shared_data, tmp_path):
    options = {"folder": str(shared_data / "census_income_kdd"), "epochs": 1, "batch": 512}
    trial = RareConversionsRecipe(**options).trial("residual", seed=0)
    assert trial.values["auc_hard"] > 0.7
    assert trial.values["positives"] > 100
    with pytest.raises(InputError, match=r"census-income\.test\.gz is missing"):
        run_recipe("rare-conversions", options={"folder": str(tmp_path)})

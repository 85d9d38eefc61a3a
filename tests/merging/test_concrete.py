"""Concrete task arithmetic: masks of a known distribution, learned by what the model answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.merging import adapt, merge
from polytask.merging.base import Place
from polytask.merging.concrete import drawn
from polytask.merging.in_memory import built, merging_method
from polytask.training.merges import candidate

from .conftest import distance
from .test_adaptive import inputs, uncertainty, world  # noqa: F401

State = dict[str, Tensor]
World = tuple[nn.Sequential, State, dict[str, State]]


def generator(seed: int = 0) -> torch.Generator:
    return Place("w", seed).generator()


@pytest.mark.parametrize("logit", [-1.5, 0.0, 2.0])
def test_masks_are_ones_as_often_as_their_logits_say(logit: float) -> None:
    x = torch.full((200, 300), logit, dtype=torch.float64)
    p = 1 / (1 + math.exp(-logit))
    hard, soft = drawn(x, generator(), 0.0), drawn(x, generator(), 0.5)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    # six standard deviations of 60 000 draws
    assert float(hard.mean()) == pytest.approx(p, abs=6 * math.sqrt(p * (1 - p) / 60000))
    # the same noise: soft masks lie on the side of one half that hard ones fall to, and tend to them
    assert torch.equal((soft > 0.5).double(), hard)
    assert float((drawn(x, generator(), 1e-4) - hard).abs().mean()) < 1e-3
    # the binary Concrete density is known: P(m < 1/4) = sigmoid(T logit(1/4) - x)
    below = 1 / (1 + math.exp(-(0.5 * math.log(1 / 3) - logit)))
    assert float((soft < 0.25).double().mean()) == pytest.approx(below, abs=6 * math.sqrt(below / 60000))


def test_the_gradient_of_a_mask_is_its_derivative() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    m = drawn(x, generator(), 0.5)
    (slope,) = torch.autograd.grad(m.sum(), x)
    assert torch.allclose(slope, m * (1 - m) / 0.5)


def test_without_steps_it_is_a_masked_sum_of_mean_one(world: World) -> None:  # noqa: F811
    model, base, experts = world
    for mask in ("continuous", "discrete"):
        found = adapt(model, base, experts, inputs(), "concrete", steps=0, mask=mask, scale=0.5, seed=3, check=False)
        for n in base:
            total = 0.5 * sum(e[n] - base[n] for e in experts.values())
            m = drawn(torch.zeros_like(base[n]), Place(n, 3).generator(), 0.5 * (mask == "continuous"))
            assert torch.allclose(found[n] - base[n], total * m / m.mean(), atol=1e-6)
    other = adapt(model, base, experts, inputs(), "concrete", steps=0, seed=4, check=False)
    assert distance(other, adapt(model, base, experts, inputs(), "concrete", steps=0, seed=3, check=False)) > 1e-3


@pytest.mark.parametrize("logits", [40.0, 500.0])
def test_where_every_entry_is_kept_it_is_task_arithmetic(logits: float, world: World) -> None:  # noqa: F811
    model, base, experts = world
    found = adapt(model, base, experts, inputs(), "concrete", steps=3, logits=logits, scale=0.4)
    assert distance(found, merge(base, experts, "task_arithmetic", scale=0.4)) < 1e-6


def test_entropy_falls_and_labels_lead_to_what_is_right(world: World) -> None:  # noqa: F811
    model, base, experts = world
    quick = {"learning_rate": 0.1, "check": False}
    start = adapt(model, base, experts, inputs(), "concrete", steps=0, **quick)
    found = adapt(model, base, experts, inputs(), "concrete", steps=60, **quick)
    assert uncertainty(model, found) < uncertainty(model, start)
    right = adapt(model, base, experts, inputs(labels=True), "concrete", steps=60, labels=True, **quick)

    def loss(state: State) -> float:
        model.load_state_dict(state)
        with torch.no_grad():
            pairs = [p for each in inputs(labels=True).values() for p in each]
            return float(sum(nn.functional.cross_entropy(model(x), y) for x, y in pairs))

    assert loss(right) < min(loss(start), loss(found))


def test_a_mask_of_nothing_leaves_the_base_and_no_hole(world: World) -> None:  # noqa: F811
    model, base, experts = world
    found = adapt(model, base, experts, inputs(), "concrete", steps=0, logits=-500.0, mask="discrete", check=False)
    assert distance(found, base) == 0


def test_scales_are_searched_where_methods_are_compared() -> None:
    assert candidate("concrete", experts=8).axes == {"scale": (0.3, 0.125)}
    assert candidate("concrete", experts=8, options={"scale": 0.2}).axes == {}


def test_refusals() -> None:
    for options, said in (
        ({"temperature": 0.0}, "temperature of concrete"),
        ({"mask": "hard"}, "'continuous' or 'discrete'"),
        ({"steps": -1}, "number of steps"),
        ({"learning_rate": 0.0}, "learning rate of concrete"),
    ):
        with pytest.raises(InputError, match=said):
            built(merging_method("concrete"), options)

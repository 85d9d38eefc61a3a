"""Models of several tasks: what is shared, what is not, and wrapping one's own module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import polytask
from polytask.autograd import Copies, LinearHeads
from polytask.errors import InputError
from polytask.models import HardSharing, wrap


def test_hard_sharing_partitions_its_parameters():
    m = HardSharing(
        nn.Linear(3, 4), {"a.b": nn.Linear(4, 1), "c": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))}
    )
    shared, own = list(m.shared_parameters()), [p for n in m.tasks for p in m.task_parameters(n)]
    assert {id(p) for p in shared} == {id(p) for p in m.trunk.parameters()}
    assert len(shared) + len(own) == len(list(m.parameters()))
    outputs = m(torch.randn(5, 3))
    assert {n: tuple(o.shape) for n, o in outputs.items()} == {"a.b": (5, 1), "c": (5, 2)}
    assert list(m(torch.randn(5, 3), tasks=["c"])) == ["c"]


def test_linear_heads_run_as_one_product_and_others_on_copies():
    plain = HardSharing(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)})
    x = torch.randn(5, 3)
    trained = plain(x)
    assert isinstance(plain.features["features"], LinearHeads)
    with torch.no_grad():
        for n, o in plain(x).items():
            torch.testing.assert_close(o, trained[n])
    assert not plain.features
    hooked = HardSharing(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)})
    seen = []
    hooked.heads[0].register_forward_hook(lambda *_: seen.append(1))
    hooked(x)
    assert isinstance(hooked.features["features"], Copies)
    assert seen == [1]


def test_a_model_can_be_copied_after_a_forward_pass():
    m = HardSharing(nn.Linear(3, 4), {"a": nn.Linear(4, 1)})
    before = m(torch.randn(2, 3))
    again = copy.deepcopy(m)
    assert m.features
    assert not again.features
    x = torch.randn(2, 3)
    torch.testing.assert_close(again(x)["a"], m(x)["a"])
    assert before["a"].requires_grad


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.tower = nn.ModuleDict({"left": nn.Linear(4, 1), "right": nn.Linear(4, 1)})

    def forward(self, x):
        z = torch.tanh(self.encoder(x))
        return {"left": self.tower["left"](z), "right": self.tower["right"](z)}


def test_wrapping_a_module_that_returns_predictions():
    m = wrap(Own(), shared=["encoder"], heads={"left": "tower.left", "right": "tower.right"})
    assert {id(p) for p in m.shared_parameters()} == {id(p) for p in m.module.encoder.parameters()}
    outputs = m(torch.randn(6, 3))
    polytask.backward({n: (o**2).mean() for n, o in outputs.items()}, shared=m.shared_parameters(), balancer="mgda")
    assert all(p.grad is not None for p in m.parameters())


def test_wrapping_a_representation_puts_heads_on_top():
    m = wrap(nn.Linear(3, 4), shared=[], heads={"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    assert isinstance(m, HardSharing)
    assert m(torch.randn(2, 3)).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"shared": ["encodr"], "heads": {"left": "tower.left", "right": "tower.right"}}, "no part called 'encodr'"),
        ({"shared": ["encoder"], "heads": {"left": "tower.left", "right": nn.Linear(4, 1)}}, "'right' is not"),
        (
            {"shared": ["encoder", "tower"], "heads": {"left": "tower.left", "right": "tower.right"}},
            "also listed as shared",
        ),
    ],
)
def test_wrapping_wrongly_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        wrap(Own(), **arguments)


def test_a_wrapped_module_that_forgets_a_task_is_named():
    class Forgetful(Own):
        def forward(self, x):
            return {"left": super().forward(x)["left"]}

    m = wrap(Forgetful(), shared=["encoder"], heads={"left": "tower.left", "right": "tower.right"})
    with pytest.raises(InputError, match="without the task 'right'"):
        m(torch.randn(2, 3))

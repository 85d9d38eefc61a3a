"""What is given wrongly is refused in a sentence, by methods of every kind, and no ``.grad`` is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import Accumulation, make
from polytask.errors import InputError

KINDS = ("equal", "famo", "upgrad", "graddrop", "modo", "f_mtl")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b, self.stranger = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(3, 3)
        self.x = torch.randn(8, 4)

    def losses(self, _=None) -> dict[str, torch.Tensor]:
        self.z = torch.tanh(self.trunk(self.x))
        return {"a": (self.a(self.z) - 1).square().mean(), "b": (self.b(self.z) + 1).square().mean()}


def refused(model: Model, match: str, method: str, shared, features=None) -> None:
    balancer = make(method)
    batches = [None] * len(balancer.roles)
    with pytest.raises(InputError, match=match):
        polytask.backward_batches(model.losses, batches, balancer=balancer, shared=shared, features=features)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", KINDS)
def test_what_is_called_shared_is_shared(method) -> None:
    m = Model()
    trunk = list(m.trunk.parameters())
    refused(
        m, r"no loss reaches shared parameter number 2 of shape \(3, 3\)", method, [*trunk, *m.stranger.parameters()]
    )
    refused(m, "only the loss of 'a' reaches it", method, [*trunk, *m.a.parameters()])
    refused(m, "of type str", method, [*trunk, "bias"])
    refused(m, "in the group 'both': take it out", method, {"both": [*trunk, *m.stranger.parameters()]})
    refused(m, "in the group 'head' is not shared: only the loss of 'a'", method, {"trunk": m.trunk, "head": m.a})


@pytest.mark.parametrize("method", ["equal", "upgrad", "graddrop"])
def test_what_is_called_shared_is_shared_where_the_representation_is_balanced_too(method) -> None:
    m = Model()
    refused(m, "only the loss of 'b' reaches it", method, [m.trunk.weight, m.b.weight], features=lambda: m.z)


@pytest.mark.parametrize("method", KINDS)
def test_a_parameter_listed_twice_counts_once(method) -> None:
    found = []
    for shared in ([0, 1], [0, 1, 0]):
        m = Model()
        trunk = list(m.trunk.parameters())
        balancer = make(method)
        batches = [None] * len(balancer.roles)
        polytask.backward_batches(m.losses, batches, balancer=balancer, shared=[trunk[i] for i in shared])
        found.append(torch.cat([p.grad.flatten() for p in trunk]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("preference", [[1, -1], [0, 1], [1, float("nan")], ["x", "y"], [], 5, {"a": 1, "b": -1}])
def test_a_preference_that_is_none(preference) -> None:
    with pytest.raises(InputError, match="one positive number a task"):
        make("upgrad", preference=preference)


def test_a_batch_without_losses_fixes_no_tasks() -> None:
    m, balancer = Model(), make("modo")
    seen = polytask.backward_batches(lambda _: {}, [None] * 3, balancer=balancer, shared=m.trunk)
    assert not seen.taken
    assert polytask.backward_batches(m.losses, [None] * 3, balancer=balancer, shared=m.trunk).taken


def test_micro_batches_are_checked_as_they_come() -> None:
    m = Model()
    with pytest.raises(InputError, match="nothing is to be balanced"):
        Accumulation(make("upgrad"), ["a", "b"], [])
    whole = Accumulation(make("upgrad"), ["a", "b"], m.trunk.parameters())
    losses = m.losses()
    with pytest.raises(InputError, match="'b' has no graph"):
        whole.add({"a": losses["a"], "b": losses["b"].detach()})
    with pytest.raises(InputError, match="the tasks are a, b; c is not"):
        whole.add({"c": losses["a"]})
    assert not whole.present.any()
    assert not whole.backward().taken
    assert all(p.grad is None for p in m.parameters())


def test_micro_batches_are_balanced_once_and_the_next_ones_begin_anew() -> None:
    m = Model()
    whole = Accumulation(make("upgrad"), ["a", "b"], m.trunk.parameters())
    for times in (1, 2):
        whole.add(m.losses())
        assert whole.backward().taken
        found = m.trunk.weight.grad.clone()
        m2 = Model()
        polytask.backward(m2.losses(), balancer="upgrad")
        torch.testing.assert_close(found, times * m2.trunk.weight.grad)
        with pytest.raises(InputError, match="balanced before"):
            whole.backward()


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (None, "not as NoneType"),
        ("ab", "not as str"),
        (3.0, "not as float"),
        (lambda ls: {**ls, "b": torch.complex(ls["b"], ls["a"])}, "loss of task 'b' is complex"),
    ],
)
def test_what_is_no_losses(losses, sentence) -> None:
    m = Model()
    with pytest.raises(InputError, match=sentence):
        polytask.backward(losses(m.losses()) if callable(losses) else losses, balancer="upgrad")
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("method", KINDS)
def test_what_cannot_be_shared(method) -> None:
    m = Model()
    refused(m, "names no group", method, {})
    refused(m, "no parameter that requires gradients", method, [])
    refused(m, "is computed from others", method, [m.trunk.weight * 2])
    for p in m.trunk.parameters():
        p.requires_grad_(False)
    refused(m, "no parameter that requires gradients", method, m.trunk)


@pytest.mark.parametrize("method", KINDS)
def test_one_tensor_is_one_shared_parameter(method) -> None:
    found = []
    for listed in (True, False):
        m = Model()
        m.trunk.bias.requires_grad_(False)
        balancer, weight = make(method), m.trunk.weight
        batches = [None] * len(balancer.roles)
        polytask.backward_batches(m.losses, batches, balancer=balancer, shared=[weight] if listed else weight)
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_tasks_need_not_be_called_by_words() -> None:
    m = Model()
    by_word, by_number = make("upgrad"), make("upgrad")
    polytask.backward(m.losses(), balancer=by_word)
    expected = m.trunk.weight.grad.clone()
    m.zero_grad()
    a, b = m.losses().values()
    assert polytask.backward({1: a, (2, "b"): b}, balancer=by_number).tasks == (1, (2, "b"))
    torch.testing.assert_close(m.trunk.weight.grad, expected)
    with pytest.raises(InputError, match="serves the tasks 1, "):
        polytask.backward({3: m.losses()["a"]}, balancer=by_number)


def test_steps_take_names_of_methods_and_one_gradient() -> None:
    m = Model()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    assert polytask.step(m.losses, [None], optimizer=optimizer, balancer="upgrad", shared=m.trunk).taken
    assert polytask.backward_batches(m.losses, [None] * 3, balancer="modo", shared=m.trunk).taken
    with pytest.raises(InputError, match="LBFGS"):
        polytask.step(m.losses, [None], optimizer=torch.optim.LBFGS(m.parameters()), balancer="upgrad")


@pytest.mark.parametrize("method", ["equal", "upgrad", "graddrop"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"level": "L2"}, "level= is 'auto', 'representation', 'exact', not 'L2'"),
        ({"level": None}, "level= is .*, not None"),
        ({"features": "z"}, "in a dict or a sequence, not str"),
        ({"features": 3}, "in a dict or a sequence, not int"),
        ({"features": ["z"]}, "one of those given is of type str"),
        ({"features": torch.zeros(8, 6)}, r"shape \(8, 6\) given as features= has no graph"),
    ],
)
def test_levels_and_features_that_are_none(method, options, sentence) -> None:
    m = Model()
    with pytest.raises(InputError, match=sentence):
        polytask.backward(m.losses(), balancer=method, **options)
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("balancer", [None, type(make("upgrad")), 3])
def test_what_is_no_balancer(balancer) -> None:
    m = Model()
    with pytest.raises(InputError, match="is a balancing method or its name"):
        polytask.backward(m.losses(), balancer=balancer)


@pytest.mark.parametrize("method", ["equal", "famo", "upgrad", "graddrop"])
@pytest.mark.parametrize("at_features", [True, False])
def test_gradients_are_off_outside_only(method, at_features) -> None:
    found = []
    for enabled in (True, False):
        m = Model()
        losses = m.losses()
        with torch.set_grad_enabled(enabled):
            polytask.backward(losses, balancer=make(method), features=m.z if at_features else None)
        found.append(torch.cat([p.grad.flatten() for p in [*m.trunk.parameters(), *m.a.parameters()]]))
    assert torch.equal(*found)


def test_a_parameter_can_be_a_loss() -> None:
    x = nn.Parameter(torch.tensor(2.0))
    seen = polytask.backward({"itself": x, "twice": 2 * x}, balancer="mgda")
    torch.testing.assert_close(seen.weights, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(x.grad, torch.tensor(1.0))

"""``every=k``: the method is asked at every k-th step, its weights serve the steps between, and a restart changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import GradientAggregator, GramianWeighting, LossWeighting, make
from polytask.errors import InputError
from polytask.models import HardSharing
from polytask.registry import Method

from .conftest import METHODS, build, gradients, losses, run, script, through_json

WEIGHING = [m for m in METHODS.values() if not issubclass(m.factory, LossWeighting)]
every_method = pytest.mark.parametrize("method", WEIGHING, ids=[m.name for m in WEIGHING])
NAMES = ("a", "b", "c")


class Counting(GramianWeighting):
    """Weights that tell how often they were asked for."""

    method = make("equal").method

    def initial_state(self, n_tasks):
        return {"asked": 0}

    def solve(self, C, losses):
        self.state["asked"] += 1
        return self.state["asked"] * 10.0**self.active


class CountingRows(GradientAggregator):
    method = make("equal").method

    def initial_state(self, n_tasks):
        return {"asked": 0}

    def aggregate(self, J, losses):
        self.state["asked"] += 1
        return self.state["asked"] * torch.as_tensor(10.0**self.active).to(J) @ J


@every_method
def test_a_method_sees_every_third_step_and_its_weights_serve_the_others(method: Method) -> None:
    steps = script(3, steps=9)
    found = run(build(method, every=3), steps)
    asked = run(build(method), steps[::3])
    for d, e in zip(found[::3], asked, strict=True):
        assert torch.equal(d, e)
    if build(method).logarithmic:  # what is combined are the gradients of log L
        steps = [(J / values[:, None], values) for J, values in steps]
    for number, (J, _) in enumerate(steps):
        first_J, first_d = steps[number // 3 * 3][0], found[number // 3 * 3]
        # the combination of that step's gradients which is nearest to the direction it took
        w = torch.linalg.lstsq(first_J.T, first_d[:, None]).solution[:, 0]
        if number % 3:
            torch.testing.assert_close(found[number], w @ J, rtol=1e-6, atol=1e-9)


@every_method
def test_a_restart_between_solves_changes_nothing(method: Method) -> None:
    steps = script(3, steps=8)
    expected = run(build(method, every=3), steps, ["x", "y", "z"])
    for cut in (1, 2, 3, 5):
        first, second = build(method, every=3), build(method, every=3, seed=9)
        done = run(first, steps[:cut], ["x", "y", "z"])
        second.load_state_dict(through_json(first.state_dict()))
        rest = run(second, steps[cut:], ["x", "y", "z"], first=cut)
        assert all(torch.equal(d, e) for d, e in zip([*done, *rest], expected, strict=True))


def test_loss_weightings_look_at_every_loss_whatever_every_says() -> None:
    steps = script(3)
    for method in METHODS.values():
        if issubclass(method.factory, LossWeighting):
            for d, e in zip(run(build(method, every=4), steps), run(build(method), steps), strict=True):
                assert torch.equal(d, e), method.name


def test_other_tasks_than_those_solved_for_are_solved_for_anew() -> None:
    balancer = Counting(every=10)
    balancer.bind(NAMES)
    J, values = gradients(0, 3, 5), losses(0, 3)
    balancer.direction(J, values)
    balancer.bind(["c", "a"])
    two = balancer.direction(J[[2, 0]], values[[2, 0]])
    assert balancer.state["asked"] == 2
    balancer.bind(["a", "c"])  # the same two in another order
    torch.testing.assert_close(balancer.direction(J[[0, 2]], values[[0, 2]]), two)
    assert balancer.state["asked"] == 2


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_every_is_a_positive_number_of_steps(every) -> None:
    with pytest.raises(InputError, match="every="):
        make("mgda", every=every)


def model() -> HardSharing:
    torch.manual_seed(0)
    heads = {n: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)) for n in NAMES}
    return HardSharing(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), heads).double()


def losses_of(m, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    outputs = m(x)
    return {n: ((outputs[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate(NAMES)}


class Passes:
    """Counts the backward passes through a trunk."""

    def __init__(self, trunk: nn.Module) -> None:
        self.number = 0
        trunk[0].weight.register_hook(self.count)

    def count(self, _gradient) -> None:
        self.number += 1


@pytest.mark.parametrize("balancer", [Counting, CountingRows])
@pytest.mark.parametrize("how", ["exact", "one pass", "two passes"])
def test_a_step_between_takes_one_backward_pass_through_the_trunk(balancer, how) -> None:
    m, passes = model(), None
    b = balancer(every=3)
    passes = Passes(m.trunk)
    for step in range(5):
        m.zero_grad()
        values = losses_of(m, step)
        features = {"exact": None, "one pass": m.features, "two passes": m.features["features"].tensor}[how]
        before = passes.number
        seen = polytask.backward(values, balancer=b, features=features)
        assert b.state["asked"] == 1 + step // 3
        if step % 3:
            assert passes.number == before + 1
            assert seen.gramian is None
            assert np.allclose(seen.weights, (1 + step // 3) * np.array([1.0, 10.0, 100.0]))
        expected = [torch.zeros_like(p) for p in m.parameters()]
        for w, loss in zip((1.0, 10.0, 100.0), losses_of(m, step).values(), strict=True):
            found = torch.autograd.grad(loss, list(m.parameters()), retain_graph=True, allow_unused=True)
            for (name, _), total, g in zip(m.named_parameters(), expected, found, strict=True):
                if g is not None:
                    total += g * (w * (1 + step // 3) if name.startswith("trunk") else 1.0)
        for p, g in zip(m.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g)

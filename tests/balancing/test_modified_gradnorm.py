"""Modified GradNorm against its definition: what moves the weights, when, and how far."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from polytask.balancing import backward, make
from polytask.errors import InputError, TrainingError

NAMES = ["a", "b", "c"]


class Net(nn.Module):
    """Two layers and three heads; the third task is measured at another layer than the first two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
        self.heads = nn.ModuleDict({n: nn.Linear(4, 1).double() for n in NAMES})

    def losses(self, seed, scales=(1.0, 0.3, 5.0)):
        x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        z = torch.tanh(self.second(torch.tanh(self.first(x))))
        return {n: s * ((self.heads[n](z) - k) ** 2).mean() for k, (n, s) in enumerate(zip(NAMES, scales, strict=True))}

    def references(self):
        return {"a": self.first.weight, "b": self.first.weight, "c": self.second.weight}


def epoch(net, balancer, batches=3, seed=0, scales=(1.0, 0.3, 5.0)):
    """One epoch without optimizer steps; the weights seen at every batch."""
    balancer.begin_epoch()
    seen = []
    for i in range(batches):
        net.zero_grad()
        seen.append(backward(net.losses(seed + i, scales), balancer=balancer).weights.clone())
    return torch.stack(seen)


def expected(net, first_losses, last_losses, alpha=1.5, lr=0.1, least=0.05, own=0.0):
    """The weights after the first epoch, by differentiating sum |G - c| with respect to w."""
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    refs = net.references()
    G = torch.stack(
        [
            torch.autograd.grad(w[k] * last_losses[n], refs[n], create_graph=True, retain_graph=True)[0].norm()
            for k, n in enumerate(NAMES)
        ]
    )
    ratio = torch.stack([(last_losses[n] / first_losses[n]).detach() for n in NAMES])
    c = (G.mean() * (ratio / ratio.mean()) ** alpha).detach()
    (slope,) = torch.autograd.grad((G - c).abs().sum(), w)
    slope = slope + own * torch.stack([last_losses[n].detach() for n in NAMES])
    moved = (w.detach() - lr * slope).clamp_min(least)
    return moved * 3 / moved.sum()


@pytest.mark.parametrize("faithful", [False, True])
def test_the_closed_form_is_the_derivative_of_what_is_minimised(faithful):
    net = Net()
    balancer = make("modified_gradnorm", references=net.references(), batches=3, faithful=faithful)
    epoch(net, balancer)
    w = expected(net, net.losses(0), net.losses(2), own=float(faithful))
    torch.testing.assert_close(balancer.state["w"].double(), w, rtol=1e-5, atol=0)
    assert float((balancer.state["w"] - 1).abs().max()) > 0.01


def test_the_weights_move_at_the_last_batch_of_an_epoch_only_and_keep_their_sum():
    net = Net()
    balancer = make("modified_gradnorm", references=net.references(), batches=3)
    weights = torch.stack([epoch(net, balancer, seed=10 * e) for e in range(4)])
    assert bool((weights == weights[:, :1]).all())  # the last batch itself still uses the old ones
    changes = weights[:, 0].diff(dim=0).abs().amax(1)
    assert float(changes.min()) > 1e-5
    torch.testing.assert_close(weights.sum(2), torch.full((4, 3), 3.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_length_of_an_epoch_is_learnt_from_the_first():
    net = Net()
    told, learnt = (make("modified_gradnorm", references=net.references(), batches=b) for b in (3, None))
    first = epoch(net, learnt)
    assert bool((first == 1).all())
    assert bool((learnt.state["w"] == 1).all())
    epoch(net, learnt, seed=5)
    epoch(net, told, seed=5)
    torch.testing.assert_close(learnt.state["w"], told.state["w"], rtol=1e-6, atol=0)
    assert float((learnt.state["w"] - 1).abs().max()) > 0.01


def test_equal_lengths_and_equal_pace_move_nothing():
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    balancer = make("modified_gradnorm", batches=2)
    for _ in range(4):
        balancer.begin_epoch()
        for _ in range(2):
            backward({n: 2 + x @ row for n, row in zip(NAMES, torch.eye(3).double(), strict=True)}, balancer=balancer)
    assert torch.equal(balancer.state["w"], torch.ones(3))


def test_the_unit_of_all_losses_is_a_unit_of_the_rate():
    net = Net()
    plain = make("modified_gradnorm", references=net.references(), batches=3, lr=0.1)
    scaled = make("modified_gradnorm", references=net.references(), batches=3, lr=0.1 / 7)
    epoch(net, plain)
    epoch(net, scaled, scales=(7.0, 2.1, 35.0))
    torch.testing.assert_close(plain.state["w"], scaled.state["w"], rtol=1e-5, atol=0)


def test_tasks_without_a_reference_are_measured_at_all_they_share():
    net = Net()
    plain, told = make("modified_gradnorm", batches=3), make("modified_gradnorm", batches=3, alpha=0.0)
    epoch(net, plain)
    epoch(net, told)
    last = net.losses(2)
    shared = [*net.first.parameters(), *net.second.parameters()]
    lengths = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]).norm()
            for loss in last.values()
        ]
    )
    moved = (1 - 0.1 * torch.sign(lengths - lengths.mean()) * lengths).clamp_min(0.05)  # alpha 0: pace does not count
    torch.testing.assert_close(told.state["w"].double(), moved * 3 / moved.sum(), rtol=1e-5, atol=0)


def test_the_published_program_differentiates_the_measure_into_the_model():
    net = Net()
    balancer = make("modified_gradnorm", references=net.references(), batches=1, faithful=True)
    found = epoch(net, balancer, batches=1)
    assert bool((found == 1).all())
    with_measure = net.first.weight.grad.clone()
    net.zero_grad()
    losses = net.losses(0)
    refs = net.references()
    G = torch.stack([torch.autograd.grad(losses[n], refs[n], create_graph=True)[0].norm() for n in NAMES])
    (sum(losses.values()) + (G - G.mean().detach()).abs().sum()).backward()  # a single batch: every ratio is 1
    torch.testing.assert_close(with_measure, net.first.weight.grad, rtol=1e-9, atol=1e-12)


def descend(least):
    """Descent on four losses of scales 1, 1, 0.02 and 5, where the weights are pushed hard: all weights seen, and the last losses."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(64, 6, generator=g)
    Y = torch.randn(4, 64, generator=g)
    torch.manual_seed(0)
    trunk, heads = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(4))
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.005, momentum=0.9)
    balancer = make("modified_gradnorm", batches=5, lr=0.5, least=least)
    seen, losses = [], []
    with contextlib.suppress(TrainingError):  # a loss that is not finite any more
        for step in range(200):
            if step % 5 == 0:
                balancer.begin_epoch()
            optimizer.zero_grad()
            z = torch.tanh(trunk(X))
            losses = [
                s * ((head(z)[:, 0] - y) ** 2).mean() for s, head, y in zip((1, 1, 0.02, 5), heads, Y, strict=True)
            ]
            seen.append(backward(losses, balancer=balancer).weights)
            optimizer.step()
    return torch.stack(seen), torch.stack(losses).detach()


def test_the_floor_keeps_weights_positive_and_losses_finite():
    w, losses = descend(0.05)
    assert len(w) == 200
    assert float(w.min()) > 0
    torch.testing.assert_close(w.sum(1), torch.full((200,), 4.0))
    assert float(losses.max()) < 10
    unfloored, _ = descend(-math.inf)
    assert float(unfloored.min()) < 0


def test_validation_that_stands_still_halves_the_rate_down_to_the_least():
    balancer = make("modified_gradnorm", lr=0.1)
    balancer.bind(NAMES)
    rates = []
    for metric in [1.0, 0.9] + [0.9] * 10:
        balancer.after_validation(metric)
        rates.append(balancer.state["lr"])
    assert rates == [0.1] * 6 + [0.05] * 5 + [0.025]
    for _ in range(200):
        balancer.after_validation(0.9)
    assert balancer.state["lr"] == 1e-4


def test_a_metric_below_zero_is_lower_where_it_is_farther_from_it():
    balancer = make("modified_gradnorm", lr=0.1)
    balancer.bind(NAMES)
    for step in range(30):
        balancer.after_validation(-0.5 - 0.01 * step)
    assert balancer.state["lr"] == 0.1
    for _ in range(5):
        balancer.after_validation(-0.5)
    assert balancer.state["lr"] == 0.05


def test_the_training_loop_tells_what_validation_gave():
    from polytask.models import HardSharing
    from polytask.tasks import Regression, Task, Tasks
    from polytask.training import TaskData, TrainConfig, train

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = TaskData(x, {n: x[:, i] for i, n in enumerate("ab")})
    tasks = Tasks([Task(n, Regression(0.0, 1.0)) for n in "ab"])
    model = HardSharing(torch.nn.Linear(4, 3), {n: torch.nn.Linear(3, 1) for n in "ab"})
    balancer = make("modified_gradnorm", lr=0.1)
    config = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, device="cpu")
    result = train(model, tasks, data, data, balancer=balancer, config=config)
    assert balancer.state["best"] == -max(result.history["score"])


def test_an_absent_task_keeps_its_share_and_bad_options_are_named():
    net = Net()
    balancer = make("modified_gradnorm", references=net.references(), batches=1)
    balancer.bind(NAMES)
    losses = net.losses(0)
    del losses["c"]
    backward(losses, balancer=balancer)
    assert float(balancer.state["w"].sum()) == pytest.approx(3, rel=1e-6)
    for options in ({"lr": 0.0}, {"least": 1.0}, {"batches": 0}):
        with pytest.raises(InputError, match="modified_gradnorm takes"):
            make("modified_gradnorm", **options)
    with pytest.raises(InputError, match="'z', which is not a task"):
        make("modified_gradnorm", references={"z": net.first.weight}).bind(NAMES)
    elsewhere = make("modified_gradnorm", references={"a": nn.Parameter(torch.ones(1))}, batches=1)
    with pytest.raises(InputError, match="measures 'a'"):
        backward(net.losses(0), balancer=elsewhere)

"""RotoGrad: rotations stay rotations, learn what they should and nothing else, and make opposite tasks agree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import make
from polytask.errors import InputError
from polytask.models import HardSharing, RotoGrad
from polytask.models.rotograd import common_direction
from polytask.registry import find

D = 6


def model_of(names="ab", size=D, width=D, seed=0, **options):
    torch.manual_seed(seed)
    heads = {n: nn.Linear(width, 3) for n in names}
    return RotoGrad(nn.Sequential(nn.Linear(4, width), nn.Tanh()), heads, size, **options).double()


def batch(seed=0, n=32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randn(3, n, 3, generator=g, dtype=torch.float64)


def losses_of(model, seed=0, names=None):
    x, y = batch(seed)
    return {n: ((out - y[i]) ** 2).mean() for i, (n, out) in enumerate(model(x, names).items())}


def turn(model, size=0.4, seed=1):
    """Some rotation other than none."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for A in model.rotations:
            A.copy_(size * torch.randn(A.shape, generator=g))


def meeting(model, seed=0, names=None):
    """The gradients of each task where they meet, unscaled: {task: g_k}."""
    single = copy.deepcopy(model).eval()
    x, y = batch(seed)
    z = single.trunk(x).detach().requires_grad_()
    found = {}
    for i, n in enumerate(names or model.tasks):
        R, d = single.rotation(n).detach(), model.size
        r = torch.cat([z[:, :d] @ R.T, z[:, d:]], 1)
        (found[n],) = torch.autograd.grad(((single.heads[i](r) - y[i]) ** 2).mean(), z)
    return found


class TestRotations:
    def test_an_unturned_model_is_hard_sharing(self):
        model = model_of()
        plain = HardSharing(model.trunk, dict(zip("ab", model.heads, strict=True)))
        x, _ = batch()
        for n in "ab":
            torch.testing.assert_close(model(x)[n], plain(x)[n])

    def test_they_stay_orthogonal_through_training(self):
        model = model_of("abc").float()
        optimizer = torch.optim.Adam(model.groups(1e-2, rotation_lr=5e-2))
        for step in range(200):
            x, y = batch(step)
            optimizer.zero_grad()
            sum(((out - y[i].float()) ** 2).mean() for i, out in enumerate(model(x.float()).values())).backward()
            optimizer.step()
        for n in "abc":
            R = model.rotation(n).detach()
            assert float((R - torch.eye(D)).norm()) > 0.1
            torch.testing.assert_close(R @ R.T, torch.eye(D), rtol=0, atol=1e-6)
            assert float(torch.linalg.det(R)) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_first_features_are_turned_and_the_others_pass(self, training):
        model = model_of(size=4).train(training)
        turn(model)
        x, _ = batch()
        z = model.trunk(x)
        R = model.rotation("b")
        r = torch.cat([torch.einsum("ij,nj->ni", R, z[:, :4]), z[:, 4:]], 1)
        torch.testing.assert_close(model(x)["b"], model.heads[1](r))

    def test_features_may_stand_on_another_axis(self):
        torch.manual_seed(0)
        trunk, heads = nn.Conv2d(2, D, 3), {n: nn.Conv2d(D, 1, 1) for n in "ab"}
        maps = RotoGrad(trunk, heads, D)
        tokens = RotoGrad(nn.Identity(), {n: nn.Linear(D, 1) for n in "ab"}, D, axis=-1)
        for one in (maps, tokens):
            turn(one)
        for n, k in (("a", 0), ("b", 1)):
            tokens.heads[k].weight.data, tokens.heads[k].bias.data = (
                heads[n].weight.data[:, :, 0, 0],
                heads[n].bias.data,
            )
        x = torch.randn(3, 2, 7, 7)
        z = trunk(x)
        for n in "ab":
            there = tokens(z.flatten(2).transpose(1, 2))[n]
            torch.testing.assert_close(maps(x)[n].flatten(2).transpose(1, 2), there)

    def test_one_task_is_never_turned(self):
        model = model_of("a")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            losses_of(model, step)["a"].backward()
            optimizer.step()
        assert torch.equal(model.rotation("a"), torch.eye(D, dtype=torch.float64))


class TestGradients:
    def test_a_rotation_receives_the_slope_of_its_own_objective(self):
        model = model_of("abc")
        turn(model)
        sum(losses_of(model).values()).backward()
        g = meeting(model)
        v = common_direction(list(g.values()), torch.stack([x.norm() for x in g.values()]))
        assert float(v.norm()) == pytest.approx(1)
        for k, n in enumerate("abc"):
            sent_back = g[n] @ model.rotation(n).detach().T

            def objective(A, h=sent_back):
                return -((v @ torch.linalg.matrix_exp(A.triu(1) - A.triu(1).T).T) * h).sum()

            A = model.rotations[k].detach().clone()
            for i, j in ((0, 1), (2, 5), (1, 3), (4, 5)):
                step = torch.zeros_like(A)
                step[i, j] = 1e-6
                slope = (objective(A + step) - objective(A - step)) / 2e-6
                torch.testing.assert_close(model.rotations[k].grad[i, j], slope, rtol=1e-5, atol=1e-9)

    def test_among_rotations_it_is_the_slope_of_the_paper_s_distance(self):
        model = model_of("abc")
        turn(model)
        sum(losses_of(model).values()).backward()
        g = meeting(model)
        mean = sum(g.values()) / 3
        v = sum(x * mean.norm() / x.norm() for x in g.values()) / 3  # as the published program has it
        for k, n in enumerate("abc"):
            sent_back = (g[n] @ model.rotation(n).detach().T).detach()
            A = model.rotations[k].detach().clone().requires_grad_()
            R = torch.linalg.matrix_exp(A.triu(1) - A.triu(1).T)
            (((v @ R.T - sent_back) ** 2).sum() / (2 * v.norm())).backward()
            torch.testing.assert_close(model.rotations[k].grad, A.grad)

    def test_the_trunk_receives_gradients_of_one_length_and_heads_their_own(self):
        model = model_of("abc")
        turn(model)
        for step in range(3):
            model.zero_grad()
            sum(losses_of(model, step).values()).backward()
            g = meeting(model, step)
            norms = torch.stack([x.norm() for x in g.values()])
            if step == 0:
                first = norms
            alpha = (norms / first) / (norms / first).sum()
            U = sum(alpha @ norms * x / x.norm() for x in g.values())
            x, _ = batch(step)
            expected = torch.autograd.grad(model.trunk(x), list(model.trunk.parameters()), U)
            for p, e in zip(model.trunk.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, e)
        plain = copy.deepcopy(model).eval()
        plain.zero_grad()
        sum(losses_of(plain, 2).values()).backward()
        for p, q in zip(model.heads.parameters(), plain.heads.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)

    def test_lengths_are_compared_with_those_after_the_burn_in(self):
        model = model_of(burn_in=2)
        for step in range(4):
            sum(losses_of(model, step).values()).backward()
            norms = torch.stack([x.norm() for x in meeting(model, step).values()])
            if step in (0, 2):
                expected = norms
            torch.testing.assert_close(model.initial, expected)

    @pytest.mark.parametrize("scale", [1e-8, 1e8])
    def test_the_unit_of_all_losses_is_that_of_all_gradients(self, scale):
        found = []
        for c in (1.0, scale):
            model = model_of("abc")
            turn(model)
            (c * sum(losses_of(model).values())).backward()
            found.append([p.grad / c for p in model.parameters()])
        for p, q in zip(*found, strict=True):
            torch.testing.assert_close(p, q)

    @pytest.mark.parametrize("balancer", ["mgda", "upgrad", "equal", "graddrop"])
    def test_a_balancer_sees_gradients_turned_and_of_one_length(self, balancer):
        model = model_of("abc")
        turn(model)
        seen = polytask.backward(
            losses_of(model), balancer=make(balancer), features=model.features, observe=True, level="representation"
        )
        g = meeting(model)
        u = torch.stack([x.flatten() / x.norm() for x in g.values()])
        if seen.gramian is not None:
            C = seen.gramian / seen.gramian.diagonal().mean()
            torch.testing.assert_close(C.double(), u @ u.T, rtol=1e-5, atol=1e-8)
        assert all(float(A.grad.norm()) > 0 for A in model.rotations)

    def test_evaluation_and_single_losses_move_nothing(self):
        model = model_of("abc")
        turn(model)
        for loss in losses_of(model).values():
            loss.backward(retain_graph=True)
        assert all(A.grad is None or not A.grad.any() for A in model.rotations)
        model.eval()
        sum(losses_of(model).values()).backward()
        with torch.no_grad():
            losses_of(model)
        assert model.initial.isnan().all()
        assert int(model.passes) == 0

    def test_absent_tasks_are_left_alone(self):
        model = model_of("abc")
        turn(model)
        losses = losses_of(model, names=["a", "b"])
        assert set(losses) == {"a", "b"}
        sum(losses.values()).backward()
        assert model.rotations[2].grad is None
        assert model.initial.isnan().tolist() == [False, False, True]
        both = meeting(model, names=["a", "b"])
        v = common_direction(list(both.values()), torch.stack([x.norm() for x in both.values()]))
        u = sum(x / x.norm() for x in both.values())
        torch.testing.assert_close(v, u / u.norm())


class TestConflict:
    def opposite(self, **options):
        """Two tasks whose heads, held fixed, read the representation with opposite signs."""
        torch.manual_seed(0)
        trunk = nn.Linear(4, D)
        heads = {n: nn.Linear(D, D, bias=False) for n in "ab"}
        model = RotoGrad(trunk, heads, D, **options).double()
        with torch.no_grad():
            heads["b"].weight.copy_(-heads["a"].weight + 0.05 * torch.randn(D, D))
        for head in heads.values():
            head.weight.requires_grad_(False)
        x, _ = batch(n=64)
        y = torch.tanh(x @ torch.randn(4, D, dtype=torch.float64))
        return model, x, y

    def losses(self, model, x, y):
        return {n: ((out - y) ** 2).mean() for n, out in model(x).items()}

    def cosine(self, model, x, y):
        seen = polytask.backward(
            self.losses(model, x, y), balancer=make("upgrad"), features=model.features, level="representation"
        )
        C = seen.gramian
        return float(C[0, 1] / (C[0, 0] * C[1, 1]).sqrt())

    def learn(self, model, x, y, rotation_lr, steps=400):
        optimizer = torch.optim.Adam(model.groups(1e-2, rotation_lr=rotation_lr))
        for _ in range(steps):
            optimizer.zero_grad()
            sum(self.losses(model, x, y).values()).backward()
            optimizer.step()
        return {n: float(loss.detach()) for n, loss in self.losses(model, x, y).items()}

    def test_rotations_bring_opposite_tasks_together(self):
        model, x, y = self.opposite()
        before = self.cosine(model, x, y)
        assert before < -0.4
        fixed = copy.deepcopy(model)
        turned = self.learn(model, x, y, rotation_lr=2e-2)
        unturned = self.learn(fixed, x, y, rotation_lr=0.0)
        assert sum(turned.values()) < 0.5 * sum(unturned.values())
        # at the same network, with its rotations and without
        with_rotations = self.cosine(model, x, y)
        with torch.no_grad():
            for A in model.rotations:
                A.zero_()
        assert with_rotations > self.cosine(model, x, y) + 0.3

    def test_rotations_alone_raise_the_cosine(self):
        model, x, y = self.opposite(scale=False)
        before = self.cosine(model, x, y)
        optimizer = torch.optim.Adam(model.rotations.parameters(), lr=2e-2)
        for _ in range(300):
            optimizer.zero_grad()
            sum(self.losses(model, x, y).values()).backward()
            optimizer.step()
        assert self.cosine(model, x, y) > before + 0.5


class TestAsAModel:
    def test_parameters_and_state(self):
        model = model_of("abc")
        assert {id(p) for p in model.shared_parameters()} == {id(p) for p in model.trunk.parameters()}
        own = list(model.task_parameters("b"))
        assert {id(p) for p in own} == {id(p) for p in [*model.heads[1].parameters(), model.rotations[1]]}
        turn(model)
        sum(losses_of(model).values()).backward()
        other = model_of("abc", seed=5)
        other.load_state_dict(model.state_dict())
        x, _ = batch(3)
        for n, out in other(x).items():
            assert torch.equal(out, model(x)[n])
        assert torch.equal(other.initial, model.initial)
        assert find("RotoGrad").factory is RotoGrad

    def test_groups_hold_every_parameter_once_and_the_rotations_apart(self):
        model = model_of("abc")
        network, rotations = model.groups(1e-2, decay=0.99)
        assert {id(p) for p in rotations["params"]} == {id(p) for p in model.rotations}
        assert len(network["params"]) + len(rotations["params"]) == len(list(model.parameters()))
        assert rotations["lr"] == pytest.approx(1e-3)
        assert (rotations["decay"], rotations["weight_decay"]) == (0.99, 0.0)

    def test_it_trains_in_the_loop(self):
        from polytask.tasks import Regression, Task, Tasks
        from polytask.training import TaskData, TrainConfig, train

        x, y = batch(n=128)
        tasks = Tasks([Task("a", Regression(0.0, 1.0)), Task("b", Regression(0.0, 1.0))])
        data = TaskData(x.float(), {"a": x[:, 0].float(), "b": -x[:, 0].float() + y[0, :, 0].float() / 9})
        torch.manual_seed(0)
        model = RotoGrad(nn.Linear(4, D), {n: nn.Linear(D, 1) for n in "ab"}, D)
        optimizer = torch.optim.Adam(model.groups(1e-2, decay=0.99))
        config = TrainConfig(epochs=5, batch_size=32, device="cpu")
        result = train(model, tasks, data, data, config=config, optimizer=optimizer)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-3 * 0.99 ** (result.steps - 1))
        assert int(model.passes) == result.best_epoch * 4
        assert all(float(A.detach().norm()) > 0 for A in model.rotations)

    def test_what_does_not_fit_is_said(self):
        with pytest.raises(InputError, match="size > 0"):
            model_of(size=0)
        with pytest.raises(InputError, match="turns 7 features, the representation has 6"):
            model_of(size=7)(batch()[0])

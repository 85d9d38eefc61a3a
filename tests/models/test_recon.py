"""Recon: the layer made to conflict is found, every task gets its own copy of it, and the result is a model like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import make
from polytask.errors import InputError
from polytask.models import BranchedModel, HardSharing, Recon, RotoGrad, wrap
from polytask.models.recon import shared_layers
from polytask.registry import find


class TwoWays(nn.Module):
    """One layer reads the first inputs, another the others; what they make is added up."""

    def __init__(self):
        super().__init__()
        self.agreed, self.disputed = nn.Linear(3, 8), nn.Linear(3, 8)

    def forward(self, x):
        return torch.cat([self.agreed(x[:, :3]), self.disputed(x[:, 3:])], 1)


def disputed_problem(seed=0):
    """Two tasks that want the same of the first inputs and the opposite of the others; heads are one and the same, held fixed."""
    torch.manual_seed(seed)
    head = nn.Linear(16, 1)
    for p in head.parameters():
        p.requires_grad_(False)
    model = HardSharing(TwoWays(), {"a": head, "b": copy.deepcopy(head)}).double()
    x = torch.randn(128, 6, dtype=torch.float64)
    same, other = x[:, 0] - 2 * x[:, 1], x[:, 3] + x[:, 4]
    return model, x, {"a": same + other, "b": same - other}


def losses_of(model, x, targets):
    return {n: ((out[:, 0] - targets[n]) ** 2).mean() for n, out in model(x).items()}


def network(seed=0, names="abc"):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
    return HardSharing(trunk, {n: nn.Linear(5, 1) for n in names}).double()


def optimise(model, x, targets, steps, lr=0.05, watch=None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        losses = losses_of(model, x, targets)
        if watch is not None:
            watch.observe(losses)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return {n: float(loss.detach()) for n, loss in losses_of(model, x, targets).items()}


class TestScores:
    def test_the_disputed_layer_has_the_highest_score_and_copying_it_ends_the_dispute(self):
        model, x, targets = disputed_problem()
        fresh = copy.deepcopy(model)
        recon = Recon(model)
        optimise(model, x, targets, 60, watch=recon)
        assert list(recon.layers) == ["trunk.agreed", "trunk.disputed"]
        assert next(iter(recon.scores)) == "trunk.disputed"
        assert recon.scores["trunk.disputed"] > recon.scores["trunk.agreed"] + 0.3
        own, shared = (optimise(m, x, targets, 150, lr=0.2) for m in (recon.branch(fresh, layers=1), fresh))
        assert max(own.values()) < 0.1 * max(shared.values())

    def test_cosines_are_those_of_the_gradients_and_the_step_goes_on(self):
        model = network()
        x, targets = torch.randn(16, 4, dtype=torch.float64), {n: torch.randn(16, dtype=torch.float64) for n in "abc"}
        recon = Recon(model, S=-0.1)
        assert list(recon.layers) == ["trunk.0", "trunk.2", "trunk.3"]
        losses = losses_of(model, x, targets)
        cosines = recon.observe(losses)
        sum(losses.values()).backward()
        below, pairs = torch.zeros(3), 0
        for layer, parameters in enumerate(recon.layers.values()):
            rows = []
            for n in "abc":
                grads = torch.autograd.grad(losses_of(model, x, targets)[n], parameters)
                rows.append(torch.cat([g.flatten() for g in grads]))
            for i in range(3):
                for j in range(3):
                    expected = torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0)
                    torch.testing.assert_close(cosines[layer, i, j], expected)
                    below[layer] += i < j and float(expected) < -0.1
                    pairs += i < j
        assert recon.conflicts.tolist() == below.tolist()
        assert int(recon.pairs.sum()) == pairs == 9

    def test_absent_tasks_and_layers_that_a_loss_does_not_reach_are_no_pairs(self):
        model = network()
        x, targets = torch.randn(16, 4, dtype=torch.float64), {n: torch.randn(16, dtype=torch.float64) for n in "abc"}
        recon = Recon(model)
        losses = losses_of(model, x, targets)
        recon.observe({"a": losses["a"], "c": losses["c"]})
        assert recon.pairs.tolist() == [1, 1, 1]
        recon.observe({"a": losses["a"], "b": model.heads[1].weight.sum()})
        assert recon.pairs.tolist() == [1, 1, 1]

    def test_counts_go_on_after_a_restart(self):
        model, x, targets = disputed_problem()
        recon = Recon(model)
        recon.observe(losses_of(model, x, targets))
        other = Recon(copy.deepcopy(model))
        other.load_state_dict(copy.deepcopy(recon.state_dict()))
        for one in (recon, other):
            one.observe(losses_of(model, x, targets))
        assert other.scores == recon.scores
        with pytest.raises(InputError, match="other layers"):
            Recon(network()).load_state_dict(recon.state_dict())


LAYERS = [["trunk.2"], ["trunk.0", "trunk.3"], ["trunk.3"], []]


class TestBranches:
    @pytest.mark.parametrize("layers", LAYERS)
    @pytest.mark.parametrize("training", [True, False])
    def test_copies_begin_equal_and_part(self, layers, training):
        model = network().train(training)
        branched = BranchedModel(model, layers)
        x = torch.randn(16, 4, dtype=torch.float64)
        for n, out in branched(x).items():
            torch.testing.assert_close(out, model(x)[n])
        if layers:
            targets = {n: k + torch.randn(16, dtype=torch.float64) for k, n in enumerate("abc")}
            optimise(branched, x, targets, 3)
            first, second = (dict(branched._own(n)) for n in "bc")
            for layer in layers:
                assert not torch.equal(first[f"{layer}.weight"], second[f"{layer}.weight"])

    @pytest.mark.parametrize("layers", LAYERS)
    def test_every_parameter_is_counted_once(self, layers):
        model = network()
        branched = BranchedModel(model, layers)
        sizes = {n: sum(p.numel() for p in ps) for n, ps in shared_layers(model).items()}
        copied = sum(sizes[n] for n in layers)
        shared = list(branched.shared_parameters())
        own = {n: list(branched.task_parameters(n)) for n in "abc"}
        assert sum(p.numel() for p in shared) == sum(sizes.values()) - copied
        assert all(sum(p.numel() for p in ps) == 6 + copied for ps in own.values())
        everything = [*shared, *(p for ps in own.values() for p in ps)]
        assert len({id(p) for p in everything}) == len(everything) == len(list(branched.parameters()))
        assert sum(p.numel() for p in branched.parameters()) == sum(p.numel() for p in model.parameters()) + 2 * copied

    def test_each_loss_reaches_its_own_copy_and_nobody_else_s(self):
        branched = BranchedModel(network(), ["trunk.2"])
        x = torch.randn(16, 4, dtype=torch.float64)
        out = branched(x)
        for n in "abc":
            branched.zero_grad()
            (out[n] ** 2).mean().backward(retain_graph=True)
            for other in "abc":
                touched = [p.grad is not None and bool(p.grad.any()) for p in branched.task_parameters(other)]
                assert any(touched) == (other == n)
            assert all(p.grad is not None for p in branched.shared_parameters())

    def test_a_step_is_that_of_a_model_written_by_hand(self):
        """Two trunks that share their first layer."""
        model, x = network(names="ab").eval(), torch.randn(16, 4, dtype=torch.float64)
        branched = BranchedModel(model, ["trunk.2"]).eval()
        t = copy.deepcopy(model.trunk)
        second = copy.deepcopy(t[2])
        by_hand = {
            "a": model.heads[0](t[4](t[3](t[2](t[1](t[0](x)))))),
            "b": model.heads[1](t[4](t[3](second(t[1](t[0](x)))))),
        }
        (by_hand["a"].sum() - by_hand["b"].pow(2).sum()).backward()
        out = branched(x)
        (out["a"].sum() - out["b"].pow(2).sum()).backward()
        torch.testing.assert_close(branched.model.trunk[0].weight.grad, t[0].weight.grad)
        torch.testing.assert_close(branched.model.trunk[2].weight.grad, t[2].weight.grad)
        torch.testing.assert_close(branched._own("b")["trunk.2.weight"].grad, second.weight.grad)

    def test_what_comes_before_the_first_copy_runs_once(self):
        branched = BranchedModel(network(), ["trunk.2"])
        calls = []
        branched.model.trunk[0].register_forward_hook(lambda *_: calls.append("before"))
        branched.model.trunk[4].register_forward_hook(lambda *_: calls.append("behind"))
        branched(torch.randn(16, 4, dtype=torch.float64))
        assert calls == ["before", "behind", "behind", "behind"]

    def test_normalisation_keeps_statistics_for_each_task(self):
        branched = BranchedModel(network(), ["trunk.2", "trunk.3"])
        x = torch.randn(16, 4, dtype=torch.float64)
        with torch.no_grad():
            branched._own("b")["trunk.2.bias"].add_(5.0)
        branched(x)
        means = [branched.model.trunk[3].running_mean, *(branched._own(n)["trunk.3.running_mean"] for n in "bc")]
        torch.testing.assert_close(means[1], means[0] + 0.1 * 5.0)
        torch.testing.assert_close(means[2], means[0])

    def test_balancing_sees_a_feature_where_all_sharing_passes_through_it(self):
        x = torch.randn(16, 4, dtype=torch.float64)
        for layers, there in ((["trunk.2", "trunk.3"], True), (["trunk.2"], False), (["trunk.0"], False)):
            branched = BranchedModel(network(), layers)
            losses = {n: (out**2).mean() for n, out in branched(x).items()}
            assert bool(branched.features) == there
            shared = list(branched.shared_parameters())
            seen = polytask.backward(losses, balancer=make("mgda"), features=branched.features or None, shared=shared)
            assert seen.level == ("representation" if there else "exact")
            assert all(p.grad is not None for p in branched.parameters())

    def test_state_goes_round(self):
        branched = BranchedModel(network(), ["trunk.0", "trunk.3"])
        x = torch.randn(16, 4, dtype=torch.float64)
        optimise(branched, x, {n: torch.randn(16, dtype=torch.float64) for n in "abc"}, 2)
        other = BranchedModel(network(seed=9), ["trunk.0", "trunk.3"])
        other.load_state_dict(copy.deepcopy(branched.state_dict()))
        for n, out in other.eval()(x).items():
            assert torch.equal(out, branched.eval()(x)[n])
        twin = copy.deepcopy(branched)
        assert torch.equal(twin(x, ["b"])["b"], branched(x, ["b"])["b"])

    def test_other_models_are_branched_too(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
                self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 1)

            def forward(self, x):
                z = self.attention(x, x, x)[0].mean(1)
                return {"a": self.one(z), "b": self.two(z)}

        x = torch.randn(8, 3, 4)
        wrapped = wrap(Own(), shared=["attention"], heads={"a": "one", "b": "two"})
        rotated = RotoGrad(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), {n: nn.Linear(5, 1) for n in "ab"}, 5)
        # the output projection is read by attention as a tensor, not called as a module
        for model, layer in ((wrapped, "module.attention.out_proj"), (rotated, "trunk.1")):
            branched = BranchedModel(model, [layer])
            own = [p for p in branched.task_parameters("b") if any(p is t for t in branched._own("b").values())]
            out = branched(x)
            for n in "ab":
                torch.testing.assert_close(out[n], model(x)[n])
            out["b"].sum().backward()
            assert all(float(p.grad.norm()) > 0 for p in own)
            assert all(p.grad is None for p in branched.model.get_submodule(layer).parameters())

    def test_it_trains_in_the_loop(self):
        from polytask.tasks import Regression, Task, Tasks
        from polytask.training import TaskData, TrainConfig, train

        model, x, targets = disputed_problem()
        tasks = Tasks([Task(n, Regression(0.0, 1.0)) for n in "ab"])
        data = TaskData(x.float(), {n: t.float() for n, t in targets.items()})
        branched = BranchedModel(model.float(), ["trunk.disputed"])
        config = TrainConfig(epochs=20, batch_size=32, learning_rate=0.05, weight_decay=0.0, device="cpu")
        result = train(branched, tasks, data, data, config=config, balancer="upgrad")
        assert result.best_score > 0.9


class TestRefusals:
    def test_what_does_not_fit_is_said(self):
        model = network()
        with pytest.raises(InputError, match=r"a cosine, in \[-1, 1\], not 2"):
            Recon(model, S=2)
        with pytest.raises(InputError, match=r"no shared layer called 'trunk.1'; it has trunk.0, trunk.2, trunk.3"):
            BranchedModel(model, ["trunk.1"])
        with pytest.raises(InputError, match="4 layers are to be copied, and the model shares 3"):
            Recon(model).branch(model, 4)
        for p in model.trunk.parameters():
            p.requires_grad_(False)
        with pytest.raises(InputError, match="no shared parameter that is trained"):
            Recon(model)

    def test_the_registry_knows_it(self):
        assert find("recon", family="models").factory is Recon

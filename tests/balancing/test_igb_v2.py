"""IGBv2 and its agent: what is remembered, one lesson beside PyTorch's own optimizers, and whether anything is learnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from polytask.balancing import make
from polytask.balancing.soft_actor_critic import SoftActorCritic
from polytask.errors import InputError
from polytask.training import load_checkpoint, save_checkpoint

L = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
SMALL = {"base_epoch": 0, "after": 1, "start": 2, "interval": 4, "batch": 8, "hidden": (6, 5), "memory": 6}


def rows(balancer):
    """The remembered transitions as (s, a, s', r)."""
    k, memory = len(balancer.tasks), balancer.state["agent"]["memory"].double().numpy()
    return [(m[:k], m[k : 2 * k], m[2 * k : 3 * k], m[3 * k]) for m in memory]


class TestMemory:
    def test_reward_is_the_least_improvement_measured_by_the_base_epoch(self):
        b = make("igb_v2", **SMALL)
        b.begin_epoch()
        b.weights(L)
        b.begin_epoch()
        values = [L, 0.9 * L, L * torch.tensor([0.8, 0.95, 0.5])]
        played = [b.weights(v) * v for v in values]
        assert b.state["agent"]["remembered"] == 2
        (s, a, after, r), second, *_ = rows(b)
        assert s == pytest.approx([1, 1, 1])
        assert after == pytest.approx([0.9] * 3)
        assert r == pytest.approx(0.1)
        assert a == pytest.approx(played[0].numpy(), rel=1e-6)
        assert second[1] == pytest.approx(played[1].numpy(), rel=1e-6)
        assert second[3] == pytest.approx(0.9 - 0.95)

    def test_absent_tasks_neither_count_nor_take_a_share(self):
        b = make("igb_v2", **SMALL)
        b.bind(["a", "b", "c"])
        b.weights(L)
        b.begin_epoch()
        b.weights(L)
        b.bind(["a", "c"])
        w = b.weights(torch.tensor([0.4, 3.6], dtype=torch.float64)) * torch.tensor([0.4, 3.6])
        assert float(w.sum()) == pytest.approx(2)
        assert rows(b)[0][3] == pytest.approx(0.1)
        b.bind(["a", "b", "c"])
        b.weights(torch.tensor([0.4, 9.0, 3.4], dtype=torch.float64))
        # the second was not seen a step ago: what became of it since is nobody's merit
        assert rows(b)[1][3] == pytest.approx(0.0)
        assert rows(b)[1][0] == pytest.approx([0.8, 1.0, 0.9])

    def test_the_oldest_makes_room(self):
        b = make("igb_v2", **SMALL)
        b.weights(L)
        b.begin_epoch()
        for n in range(10):
            b.weights(L * (1 - 0.01 * n))
        assert b.state["agent"]["remembered"] == 9
        assert sorted(s[0] for s, *_ in rows(b)) == pytest.approx([1 - 0.01 * n for n in range(8, 2, -1)])


class TestSchedule:
    def test_random_first_then_the_agent(self):
        b = make("igb_v2", seed=4, **{**SMALL, "after": 9})
        for epoch in range(4):
            b.begin_epoch()
            generator = np.random.default_rng()
            if b.tasks:
                generator.bit_generator.state = b.rng.bit_generator.state
            w = (b.weights(L) * L).numpy()
            if 0 < epoch < 2:
                z = np.exp(generator.standard_normal(3))
                assert w == pytest.approx(3 * z / z.sum())
            if epoch >= 2:
                assert w == pytest.approx(b.agent(3).act(b.state["agent"], b.state["seen"], generator))
        assert b.state["agent"]["lessons"] == 0

    def test_lessons_grow_in_number_and_size_with_memory(self, monkeypatch):
        sizes = []
        monkeypatch.setattr(SoftActorCritic, "learn", lambda self, state, batch, rng: sizes.append(batch))
        b = make("igb_v2", **{**SMALL, "memory": 8, "interval": 4, "batch": 16})
        b.weights(L)
        b.begin_epoch()
        for _ in range(13):
            b.weights(L)
        # at steps 4, 8 and 12 with 3, 7 and 11 transitions: floor(4 (1 + n / 8) / 2) lessons
        assert sizes == [11] * 2 + [15] * 3 + [16] * 4

    def test_weights_have_mean_one_times_the_preference(self):
        plain, leaning = make("igb_v2", **SMALL), make("igb_v2", preference=[1, 2, 3], **SMALL)
        a, b = plain.weights(L) * L, leaning.weights(L) * L
        assert float(a.mean()) == pytest.approx(1)
        assert torch.allclose(b, a * torch.tensor([0.5, 1.0, 1.5]))

    def test_random_weights_treat_all_tasks_alike(self):
        b = make("igb_v2", **{**SMALL, "start": 9, "memory": 2})
        drawn = torch.stack([b.weights(L) * L for _ in range(3000)])
        assert drawn.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.06)

    @pytest.mark.parametrize("options", [{"after": -1}, {"interval": 0}, {"batch": 1}, {"lr": 0.0}, {"discount": 1.0}])
    def test_refuses(self, options):
        with pytest.raises(InputError, match="igb_v2 needs"):
            make("igb_v2", **options)


class Reference:
    """The same lesson by torch.nn, torch.optim and torch.distributions."""

    def __init__(self, agent: SoftActorCritic, state: dict) -> None:
        self.agent = agent
        self.actor = self.network(agent._actor.layers_of(state["actor"]), 0)
        critics, slow = (agent._critics.layers_of(state[n]) for n in ("critics", "slow_critics"))
        self.critics, self.slow = ([self.network(layers, j) for j in (0, 1)] for layers in (critics, slow))
        self.log_alpha = torch.nn.Parameter(state["log_temperature"].clone())
        groups = ([*self.actor.parameters()], [p for c in self.critics for p in c.parameters()], [self.log_alpha])
        self.adams = [torch.optim.Adam(g, lr=agent.lr) for g in groups]

    @staticmethod
    def network(layers: list, j: int) -> torch.nn.Sequential:
        parts: list[torch.nn.Module] = []
        for W, b in zip(layers[::2], layers[1::2], strict=True):
            linear = torch.nn.Linear(*W[j].shape)
            linear.weight.data, linear.bias.data = W[j].T.clone(), b[j, 0].clone()
            parts += [linear, torch.nn.ReLU()]
        return torch.nn.Sequential(*parts[:-1])

    def play(self, s: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        mu, log_std = self.actor(s).chunk(2, 1)
        noise = torch.as_tensor(rng.standard_normal(mu.shape, dtype=np.float32))
        normal = Normal(mu, log_std.exp())
        u = mu + log_std.exp() * noise
        density = TransformedDistribution(normal, TanhTransform(cache_size=1))
        value = density.transforms[0](u)
        return self.agent.tasks * torch.softmax(u, 1), density.log_prob(value).sum(1, keepdim=True)

    @staticmethod
    def least(critics: list, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.minimum(*(c(torch.cat([s, a], 1)) for c in critics))

    def lesson(self, s, a, after, r, rng) -> None:
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            played, density = self.play(after, rng)
            target = r + self.agent.discount * (self.least(self.slow, after, played) - alpha * density)
        loss = sum(torch.nn.functional.mse_loss(c(torch.cat([s, a], 1)), target) for c in self.critics)
        self.step(1, loss)
        played, density = self.play(s, rng)
        self.step(0, (alpha * density - self.least(self.critics, s, played)).mean())
        self.step(2, -(self.log_alpha * (density.detach() - self.agent.tasks)).mean())
        for c, slow in zip(self.critics, self.slow, strict=True):
            for p, q in zip(c.parameters(), slow.parameters(), strict=True):
                q.data.lerp_(p.data, self.agent.follow)

    def step(self, which: int, loss: torch.Tensor) -> None:
        self.adams[which].zero_grad()
        loss.backward()
        self.adams[which].step()


class TestAgent:
    def test_lessons_are_those_of_torchs_own_parts(self):
        agent = SoftActorCritic(3, hidden=(7, 5), lr=0.01, memory=40)
        rng = np.random.default_rng(1)
        state = agent.start(rng)
        for _ in range(50):
            agent.remember(state, rng.random(3), 2 * rng.random(3), rng.random(3), float(rng.random()))
        reference = Reference(agent, state)
        for n in range(20):
            batch = state["memory"][torch.as_tensor(np.random.default_rng(n).integers(40, size=16))]
            generator = np.random.default_rng(n)
            generator.integers(40, size=16)
            reference.lesson(*batch.split([3, 3, 3, 1], 1), generator)
            agent.learn(state, 16, np.random.default_rng(n))
        expected = Reference(agent, state)
        for ours, theirs in zip(
            (expected.actor, *expected.critics, *expected.slow),
            (reference.actor, *reference.critics, *reference.slow),
            strict=True,
        ):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state["log_temperature"], reference.log_alpha.data, rtol=1e-4, atol=1e-5)

    def test_starts_as_linear_layers_do(self):
        agent = SoftActorCritic(4, hidden=(9, 16))
        W1, b1, W2, b2, _, b3 = agent._critics.layers_of(agent.start(np.random.default_rng(0))["critics"])
        assert W1.shape == (2, 8, 9)
        assert b3.shape == (2, 1, 1)
        for layer, inputs in ((W1, 8), (b1, 8), (W2, 9), (b2, 9)):
            assert 0.6 < float(layer.abs().max()) * math.sqrt(inputs) <= 1
        assert not torch.equal(W1[0], W1[1])

    def test_finds_the_weights_that_pay(self):
        """Reward is the first weight: with no future to mind, the agent comes to give nearly everything to the first task."""
        agent = SoftActorCritic(2, hidden=(16, 16), lr=0.02, discount=0.0, temperature=0.05, memory=200)
        rng = np.random.default_rng(0)
        state = agent.start(rng)
        s = np.ones(2)
        for _ in range(200):
            z = np.exp(rng.standard_normal(2))
            a = 2 * z / z.sum()
            agent.remember(state, s, a, s, a[0])
        before = np.mean([agent.act(state, s, rng)[0] for _ in range(200)])
        for _ in range(200):
            agent.learn(state, 64, rng)
        learnt = np.mean([agent.act(state, s, rng)[0] for _ in range(200)])
        assert before < 1.4
        assert learnt > 1.6

    def test_survives_a_checkpoint_on_disk(self, tmp_path):
        def steps(balancer, numbers):
            found = []
            for n in numbers:
                if n % 3 == 0:
                    balancer.begin_epoch()
                found.append(balancer.weights(L * (1 - 0.01 * n * torch.tensor([1.0, 0.5, 0.2]))))
            return torch.stack(found)

        straight, first, second = (make("igb_v2", seed=seed, **SMALL) for seed in (1, 1, 2))
        expected = steps(straight, range(30))
        steps(first, range(17))
        assert first.state["agent"]["lessons"] > 0
        save_checkpoint(tmp_path / "state", first.state_dict())
        second.load_state_dict(load_checkpoint(tmp_path / "state"))
        assert torch.equal(steps(second, range(17, 30)), expected[17:])

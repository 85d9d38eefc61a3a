"""Where the field keeps several conventions under one name, each is reached by an option, and the golden figures of each are met.

J1 and J2 are the two sets of task gradients for which the peers' and the authors' figures are known (see test_golden.py for the
directions without options).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import make
from polytask.errors import InputError

J1 = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
J2 = torch.tensor([[1, 2, -1, 0.5], [-2, 0.5, 1, 1], [0.3, -1, 2, -0.4]], dtype=torch.float64)

DIRECTIONS = [
    ("aligned_mtl", {"average": True}, J1, [0.21328, 0.96733, 0.96733]),
    ("aligned_mtl", {"average": True}, J2, [0.02626, 0.45369, 0.55568, 0.24703]),
    ("aligned_mtl", {"average": True, "scale": "rmse"}, J1, [0.57638, 2.61417, 2.61417]),
    ("aligned_mtl", {"average": True, "scale": "rmse"}, J2, [0.04858, 0.83927, 1.02794, 0.45698]),
    ("nash_mtl", {"max_norm": 1.0}, J1, [0.0541534, 0.7060691, 0.7060691]),
    ("cagrad", {"rescale": 1}, J1, [v / 1.25 for v in (0.1835, 1.20412, 1.20412)]),
    ("cagrad", {"rescale": 2}, J1, [v / 1.5 for v in (0.1835, 1.20412, 1.20412)]),
    ("pcgrad", {"order": "ascending", "average": True}, J2, [v / 3 for v in (-0.21461, 2.57983, 3.05186, 1.52054)]),
]
WEIGHTS = [
    ("aligned_mtl", {"average": True}, J1, [0.5591, 0.4083]),
    ("upgrad", {}, J1, [1.1109, 0.7894]),  # the peer regularises by 1e-4
    (
        "mgda",
        {},
        J2,
        [(0.43288 + 0.1) / 1.3, (0.12523 + 0.1) / 1.3, (0.44189 + 0.1) / 1.3],
    ),  # what SDMGrad's make of the same point
    ("nash_mtl", {}, J2, [0.80686, 0.4703, 0.79437]),
]


@pytest.mark.parametrize(("name", "options", "J", "printed"), DIRECTIONS)
def test_directions_of_other_conventions(name, options, J, printed):
    expected = torch.tensor(printed, dtype=J.dtype)
    assert float((make(name, **options).direction(J) - expected).norm()) < 2e-5 * float(expected.norm()) + 1e-5


@pytest.mark.parametrize(("name", "options", "J", "printed"), WEIGHTS)
def test_printed_weights(name, options, J, printed):
    assert make(name, **options).weights(J @ J.T).tolist() == pytest.approx(printed, rel=3e-4)


@pytest.mark.parametrize(("J", "printed"), [(J1, [0.63, 0.37]), (J2, [0.43288, 0.12523, 0.44189])])
def test_sdmgrad_weights_before_the_mean_joins(J, printed):
    """What is printed is the point of the simplex; what is returned has the pull towards the mean in it."""
    w = make("sdmgrad", lam=0.3).weights(J @ J.T)
    assert (1.3 * w - 0.3 / len(J)).tolist() == pytest.approx(printed, abs=1e-5)


def test_alignings_median_is_an_eigenvalue():
    """Of two in the middle the smaller, as torch.median has it in the authors' code: of two tasks that is the least."""
    assert torch.equal(make("aligned_mtl", scale="median").direction(J1), make("aligned_mtl").direction(J1))
    J = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert make("aligned_mtl", scale="median").direction(J).tolist() == pytest.approx([2.0] * 4)


class TestNash:
    @pytest.mark.parametrize("c", [1e-6, 1.0, 1e5])
    @pytest.mark.parametrize("longest", [0.3, 1.0, 5.0])
    def test_no_direction_is_longer_than_asked(self, c, longest):
        plain, short = make("nash_mtl").direction(c * J2), make("nash_mtl", max_norm=longest).direction(c * J2)
        assert float(short.norm()) == pytest.approx(min(longest, math.sqrt(3)))
        assert torch.allclose(short / short.norm(), plain / plain.norm())

    def test_refuses(self):
        with pytest.raises(InputError, match="positive max_norm, not 0"):
            make("nash_mtl", max_norm=0.0)


class TestCAGrad:
    def test_switches_of_before_mean_the_same(self):
        assert torch.equal(make("cagrad", rescale=True).direction(J2), make("cagrad", rescale=1).direction(J2))
        assert torch.equal(make("cagrad", rescale=False).direction(J2), make("cagrad").direction(J2))

    @pytest.mark.parametrize("c", [0.1, 0.5, 3.0])
    def test_the_last_way_makes_no_step_longer_than_the_mean(self, c):
        for J in (J1, J2):
            assert float(make("cagrad", c=c, rescale=2).direction(J).norm()) <= float(J.mean(0).norm()) * (1 + 1e-9)

    def test_refuses(self):
        with pytest.raises(InputError, match="rescale=0, 1 or 2, not 3"):
            make("cagrad", rescale=3)


class TestRandomWeights:
    @pytest.mark.parametrize(
        ("distribution", "mean_square"),
        [
            ("normal", None),
            ("uniform", None),
            ("dirichlet", 2 / 12),  # second moment of a coordinate of the uniform distribution on the simplex of three
            ("bernoulli", (1 + 2 / 4 + 1 / 9) / 7),  # one task, two, all three
            ("constrained_bernoulli", 1 / 3),
        ],
    )
    def test_weights_sum_to_one_and_have_their_spread(self, distribution, mean_square):
        b = make("rlw", distribution=distribution, seed=5)
        losses = torch.ones(3, dtype=torch.float64)
        w = torch.stack([b.weights(losses) for _ in range(2000)])
        assert torch.allclose(w.sum(1), torch.ones(2000, dtype=torch.float64))
        error = 5 * w.std(0) / math.sqrt(2000)
        assert bool(((w.mean(0) - 1 / 3).abs() < error).all())
        if mean_square is not None:
            square = w.square()
            assert bool(((square.mean(0) - mean_square).abs() < 5 * square.std(0) / math.sqrt(2000)).all())

    def test_uniform_weights_are_softmaxes_of_numbers_between_0_and_1(self):
        b = make("rlw", distribution="uniform")
        for _ in range(50):
            w = b.weights(torch.ones(4, dtype=torch.float64))
            assert float(w.max() / w.min()) < math.e

    def test_bernoulli_draws_every_set_alike(self):
        b = make("rlw", distribution="bernoulli", seed=1)
        sets = [tuple((b.weights(torch.ones(2)) > 0).tolist()) for _ in range(3000)]
        counts = {s: sets.count(s) for s in set(sets)}
        assert set(counts) == {(True, False), (False, True), (True, True)}
        assert all(abs(n - 1000) < 5 * math.sqrt(3000 * 2 / 9) for n in counts.values())

    def test_refuses(self):
        with pytest.raises(InputError, match=r"rlw draws from one of 'normal', .*, not 'cauchy'"):
            make("rlw", distribution="cauchy")


class TestIdeals:
    """Lower bounds of the losses, one for all tasks or one for each."""

    L = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    Z = (0.2, 1.0, 3.5)

    def test_famo_measures_from_each_tasks_lowest_loss(self):
        b, plain = make("famo", lowest=self.Z), make("famo")
        for step in range(5):
            values = self.L * (1 - 0.01 * step)
            distance = values - torch.tensor(self.Z, dtype=torch.float64)
            assert torch.allclose(b.weights(values), plain.weights(distance))
            for balancer, at in ((b, values * 0.99), (plain, values * 0.99 - torch.tensor(self.Z))):
                # the second look may come in another order
                balancer.after_step({name: at[int(name)] for name in ("2", "0", "1")})
        assert b.state["xi"].tolist() == pytest.approx(plain.state["xi"].tolist(), rel=1e-5)
        assert len(set(b.state["xi"].tolist())) == 3

    def test_stch_measures_from_each_tasks_ideal(self):
        mu, z = 0.3, torch.tensor(self.Z, dtype=torch.float64)
        b = make("stch", warmup=None, mu=mu, ideal=self.Z)
        b.bind(["a", "b", "c"])
        total, w = b.combine(self.L)
        assert float(total) == pytest.approx(3 * mu * float(torch.logsumexp((self.L - z) / mu, 0)))
        assert torch.allclose(w, 3 * torch.softmax((self.L - z) / mu, 0))

    def test_modified_stch_divides_by_the_preference(self):
        b = make("softmtche", preference=[1, 2, 3])
        b.bind(["a", "b", "c"])
        total, w = b.combine(self.L)
        v = torch.tensor([2.0, 1.0, 2 / 3], dtype=torch.float64)  # one over the preference that sums to 3
        assert float(total) == pytest.approx(3 * 0.1 * float(torch.logsumexp(v * self.L / 0.1, 0)))
        assert torch.allclose(w, 3 * v * torch.softmax(v * self.L / 0.1, 0))
        sharp = make("stch", warmup=None, mu=1e-4, modified=True, preference=[1, 2, 3]).weights(self.L)
        assert torch.allclose(sharp, 3 * make("mtche", preference=[1, 2, 3]).weights(self.L))

    def test_absent_tasks_take_their_ideals_along(self):
        for name, options in (("famo", {"lowest": self.Z}), ("stch", {"warmup": None, "ideal": self.Z})):
            b = make(name, **options)
            b.bind(["a", "b", "c"])
            b.bind(["c", "a"])
            there = make(name, **{k: [v[2], v[0]] if isinstance(v, tuple) else v for k, v in options.items()})
            assert torch.allclose(b.weights(self.L[[2, 0]]), there.weights(self.L[[2, 0]]))

    @pytest.mark.parametrize(
        ("name", "options"), [("famo", {"lowest": [0.1]}), ("stch", {"warmup": None, "ideal": [0.1]})]
    )
    def test_refuses_another_number_of_them(self, name, options):
        with pytest.raises(InputError, match=r"1 .* for 3 tasks"):
            make(name, **options).weights(self.L)


class TestGradVacByGroup:
    """GradVac's cosines of the whole model, of layers or of matrices, as the caller groups the shared parameters."""

    def test_every_group_remembers_cosines_of_its_own(self):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
        heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(3)]).double()
        x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)

        def losses():
            z = torch.tanh(trunk(x))
            return {n: ((h(z)[:, 0] - y[:, i]) ** 2).mean() for i, (n, h) in enumerate(zip("abc", heads, strict=True))}

        layers = {"first": list(trunk[0].parameters()), "second": list(trunk[2].parameters())}
        by_layer = make("gradvac", beta=0.5, order="ascending")
        apart = {name: make("gradvac", beta=0.5, order="ascending") for name in layers}
        for step in range(4):
            found = losses()
            rows = {
                name: torch.stack(
                    [
                        torch.cat([g.flatten() for g in torch.autograd.grad(v, its, retain_graph=True)])
                        for v in found.values()
                    ]
                )
                for name, its in layers.items()
            }
            trunk.zero_grad()
            polytask.backward(found, shared=layers, balancer=by_layer, level="exact")
            for name, its in layers.items():
                expected = apart[name].direction(rows[name])
                assert torch.allclose(torch.cat([p.grad.flatten() for p in its]), expected, rtol=1e-9), (name, step)
            with torch.no_grad():
                for p in trunk.parameters():
                    p -= 0.1 * p.grad
        memories = [apart[name].state["rho"] for name in layers]
        assert not np.allclose(*memories, atol=1e-3)

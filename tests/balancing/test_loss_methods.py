"""The methods that see only loss values, against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import polytask
from polytask.balancing import Balancer, LossWeighting, make
from polytask.errors import InputError

from .conftest import METHODS

L = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


def weights(balancer: Balancer, losses: torch.Tensor = L) -> list[float]:
    assert isinstance(balancer, LossWeighting)
    return balancer.weights(losses).tolist()


def epochs(balancer: Balancer, values: list[torch.Tensor]) -> list[list[float]]:
    found = []
    for v in values:
        balancer.begin_epoch()
        found.append(weights(balancer, v))
    return found


VALUE_METHODS = [m.name for m in METHODS.values() if issubclass(m.factory, LossWeighting)]


@pytest.mark.parametrize("name", VALUE_METHODS)
def test_reported_weights_are_the_derivatives(name):
    """What is logged as a weight is d(total)/d(loss) (LibMTL's geometric mean and STCH log something else)."""
    for warm in (0, 6):
        b = make(name, **({"warmup": 0} if name == "stch" else {"base_epoch": 0} if name.startswith("igb") else {}))
        assert isinstance(b, LossWeighting)
        b.bind(["a", "b", "c"])
        for e in range(warm):
            b.begin_epoch()
            b.weights(L * (1 - 0.1 * e) ** torch.arange(1, 4))
        b.begin_epoch()
        losses = L.clone().requires_grad_()
        total, w = b.combine(losses)
        (slope,) = torch.autograd.grad(total, losses)
        assert torch.allclose(slope, w.to(slope), rtol=1e-6)


class TestUncertainty:
    def test_first_step(self):
        assert weights(make("uncertainty")) == pytest.approx([math.exp(0.5) / 2] * 3, rel=1e-6)

    def test_converges_to_half_the_inverse_loss(self):
        b = make("uncertainty", lr=0.05)
        for _ in range(600):
            w = weights(b)
        assert w == pytest.approx([1 / (2 * v) for v in L.tolist()], rel=1e-3)

    def test_steps_are_those_of_adam(self):
        s = torch.nn.Parameter(torch.full((3,), -0.5))
        optimizer = torch.optim.Adam([s], lr=0.025)
        b = make("uncertainty")
        for step in range(15):
            losses = (L * (1 + 0.3 * math.sin(step))).float()
            w = weights(b, losses)
            assert w == pytest.approx((0.5 * torch.exp(-s.detach())).tolist(), rel=1e-5)
            optimizer.zero_grad()
            (losses / (2 * torch.exp(s)) + s / 2).sum().backward()
            optimizer.step()


class TestDWA:
    def test_formula(self):
        first, second = L, L * torch.tensor([0.5, 1.0, 0.25])
        w = epochs(make("dwa", temperature=2.0), [first, second, L])
        assert w[0] == w[1] == [1.0, 1.0, 1.0]
        expected = 3 * torch.softmax(torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64) / 2, 0)
        assert w[2] == pytest.approx(expected.tolist(), rel=1e-6)

    def test_means_are_taken_over_the_epoch(self):
        b = make("dwa")
        for epoch in ([L, 3 * L], [L, L], [L]):
            b.begin_epoch()
            for v in epoch:
                w = weights(b, v)
        assert w == pytest.approx([1.0] * 3)  # all ratios are 1/2
        assert b.state["last"].tolist() == pytest.approx(L.tolist())
        assert b.state["before_last"].tolist() == pytest.approx((2 * L).tolist())

    def test_a_task_absent_for_an_epoch_keeps_its_means(self):
        b = make("dwa")
        names = ["a", "b", "c"]
        for present in (names, names, ["a"], names):
            b.bind(names)
            b.begin_epoch()
            b.bind(present)
            weights(b, L[: len(present)] * (2.0 if present == ["a"] else 1.0))
        assert b.state["last"].tolist() == pytest.approx([1.0, 2.0, 4.0])

    def test_without_epochs_the_weights_stay_equal(self):
        b = make("dwa")
        assert all(weights(b, L * 0.9**i) == [1.0, 1.0, 1.0] for i in range(5))


class TestGeometricMean:
    def test_value_and_gradient(self):
        b = make("geometric_mean")
        assert isinstance(b, LossWeighting)
        b.bind(["a", "b", "c"])
        total, w = b.combine(L)
        assert float(total) == pytest.approx((0.5 * 2 * 4) ** (1 / 3))
        assert (w * L).tolist() == pytest.approx([float(total) / 3] * 3)

    def test_many_small_losses_do_not_underflow(self):
        losses = torch.full((100,), 1e-8)
        assert weights(make("geometric_mean"), losses) == pytest.approx([0.01] * 100, rel=1e-4)


class TestSTCH:
    def test_approaches_the_maximum(self):
        b = make("stch", warmup=None, mu=1e-3)
        assert isinstance(b, LossWeighting)
        b.bind(["a", "b", "c"])
        total, w = b.combine(L)
        assert float(total) == pytest.approx(3 * 4.0, rel=1e-6)
        assert w.tolist() == pytest.approx([0, 0, 3.0])

    def test_warm_up_then_nadir(self):
        b = make("stch", mu=0.5, warmup=1)
        steps = [L, 2 * L, L * torch.tensor([1.0, 2.0, 3.0])]
        w = epochs(b, steps)
        for found, values in zip(w[:2], steps[:2], strict=True):
            assert found == pytest.approx((1 / values).tolist())
        f = torch.log(steps[2] / (2 * L))
        assert w[2] == pytest.approx((3 * torch.softmax(f / 0.5, 0) / steps[2]).tolist(), rel=1e-6)

    def test_told_of_an_epoch_before_or_after_binding_counts_the_same(self):
        early, late = make("stch", warmup=0), make("stch", warmup=0)
        late.bind(["0", "1", "2"])
        assert epochs(early, [L, L, 2 * L]) == epochs(late, [L, L, 2 * L])

    def test_refuses_no_smoothness(self):
        with pytest.raises(InputError, match="mu of stch is positive"):
            make("stch", mu=0.0)


class TestFAMO:
    def test_first_weights(self):
        w = weights(make("famo"))
        assert w == pytest.approx(((1 / L) / (1 / L).sum()).tolist())

    def test_follows_the_published_algorithm(self):
        xi = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.Adam([xi], lr=0.025, weight_decay=1e-3)
        b = make("famo")
        b.bind(["a", "b", "c"])
        for step in range(30):
            before = L * 0.9 ** (step * torch.arange(1, 4) / 3)
            after = before * torch.tensor([0.97, 0.95, 0.99 - 0.001 * step])
            z = torch.softmax(xi, 0)
            expected = z.detach() / before / (z.detach() / before).sum()
            assert weights(b, before) == pytest.approx(expected.tolist(), rel=1e-5)
            b.after_step(dict(zip("abc", after, strict=True)))
            optimizer.zero_grad()
            z.backward((before.log() - after.log()).float())
            optimizer.step()

    def test_the_next_losses_stand_in_for_a_second_look(self):
        told, untold = make("famo"), make("famo")
        for b in (told, untold):
            b.bind(["a", "b", "c"])
        series = [L, L * torch.tensor([0.9, 0.5, 1.0]), L * 0.4]
        for now, following in pairwise(series):
            weights(told, now)
            told.after_step(dict(zip("abc", following, strict=True)))
            weights(untold, now)
        assert weights(told, series[-1]) == weights(untold, series[-1])

    def test_slow_tasks_gain_weight(self):
        b = make("famo")
        b.bind(["a", "b", "c"])
        equal = torch.ones(3, dtype=torch.float64)
        for _ in range(50):
            w = weights(b, equal)
            b.after_step(dict(zip("abc", equal * torch.tensor([0.5, 0.9, 1.0]), strict=True)))
        assert w[0] < w[1] < w[2]


class TestScalarizations:
    """Values and limits of the classical scalarizations."""

    p = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)

    def value(self, name: str, losses: torch.Tensor = L, **options: object) -> float:
        b = make(name, **options)
        assert isinstance(b, LossWeighting)
        b.bind(["a", "b", "c"])
        return float(b.combine(losses)[0])

    def test_tchebycheff(self):
        assert self.value("tchebycheff") == 4.0
        assert self.value("tchebycheff", preference=self.p.tolist()) == pytest.approx(6.0)
        assert self.value("tchebycheff", preference=self.p.tolist(), modified=True) == pytest.approx(4 / 1.5)
        assert self.value("tchebycheff", rho=0.1, ideal=[0.5, 1.0, 1.0]) == pytest.approx(3.0 + 0.1 * 4.0)

    def test_tchebycheff_ties_share(self):
        assert weights(make("tchebycheff"), torch.tensor([2.0, 2.0, 1.0])) == [0.5, 0.5, 0.0]

    def test_p_norm(self):
        assert self.value("p_norm", q=2.0) == pytest.approx(float(L.norm()))
        assert self.value("p_norm", q=1.0) == pytest.approx(6.5)
        assert self.value("p_norm", q=200.0) == pytest.approx(4.0, rel=1e-2)
        assert weights(make("p_norm", q=50.0), L * 1e-30) == pytest.approx([0, 0, 1], abs=1e-9)

    def test_pbi(self):
        u = torch.ones(3, dtype=torch.float64) / math.sqrt(3)
        d1 = L @ u
        assert self.value("pbi", theta=5.0) == pytest.approx(float(d1 + 5 * (L - d1 * u).norm()))
        on_the_ray = 3 * self.p
        w = weights(make("pbi", preference=self.p.tolist()), on_the_ray)
        assert w == pytest.approx((self.p / self.p.norm()).tolist())

    def test_cosmos(self):
        cosine = L.sum() / (math.sqrt(3) * L.norm())
        assert self.value("cosmos", lam=2.0) == pytest.approx(float(L.sum() - 2 * cosine))

    def test_the_ideal_point_has_one_number_a_task(self):
        with pytest.raises(InputError, match="ideal point has 2 numbers for 3 tasks"):
            self.value("pbi", ideal=[0.0, 1.0])


class TestGO4Align:
    def test_without_history_weights_undo_the_losses(self):
        assert weights(make("go4align", groups=3, eta=0.0)) == pytest.approx((L.sum() / (3 * L)).tolist())

    def test_history_leans_towards_small_losses(self):
        b = make("go4align", groups=3, eta=0.1)
        weights(b, L)
        q = torch.softmax(-0.1 * 3 * L, 0)
        assert weights(b, 2 * L) == pytest.approx((q * L.sum() / L).tolist())

    def test_groups_share_their_mean(self):
        losses = torch.tensor([1.0, 4.0, 1.1, 3.8], dtype=torch.float64)
        u = losses.sum() / (4 * losses)
        near, far = float(u[[0, 2]].mean()), float(u[[1, 3]].mean())
        assert weights(make("go4align", groups=2, eta=0.0), losses) == pytest.approx([near, far, near, far])
        assert weights(make("go4align", groups=1, eta=0.0), losses) == pytest.approx([float(u.mean())] * 4)

    def test_groups_are_the_best_of_all_partitions(self):
        rng = torch.Generator().manual_seed(0)
        for _ in range(20):
            losses = torch.rand(6, generator=rng, dtype=torch.float64) + 0.1
            u = losses.sum() / (6 * losses)
            w = torch.tensor(weights(make("go4align", groups=2, eta=0.0), losses))
            found = float(((u - w) ** 2).sum())
            splits = [[i for i in range(6) if mask >> i & 1] for mask in range(1, 63)]
            rest = [[i for i in range(6) if i not in s] for s in splits]
            best = min(
                sum(float(((u[g] - u[g].mean()) ** 2).sum()) for g in pair) for pair in zip(splits, rest, strict=True)
            )
            assert found == pytest.approx(best, abs=1e-12)


class TestFurtherWeightings:
    def test_igb_measures_by_the_base_epoch(self):
        w = epochs(make("igb", base_epoch=1), [L, 2 * L, L * torch.tensor([1.0, 2.0, 3.0])])
        assert w[0] == pytest.approx((1 / L).tolist())
        assert w[1] == pytest.approx((1 / (2 * L)).tolist())
        gap = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        assert w[2] == pytest.approx((3 * torch.softmax(gap, 0) / (L * 2 * gap)).tolist(), rel=1e-6)

    def test_uw_o_is_where_uncertainty_ends(self):
        ends = torch.tensor([1 / (2 * v) for v in L.tolist()])
        assert weights(make("uw_o")) == pytest.approx((ends / ends.sum()).tolist())

    def test_uw_so(self):
        assert weights(make("uw_so", temperature=2.0)) == pytest.approx(torch.softmax(1 / (2 * L), 0).tolist())
        assert weights(make("uw_so", temperature=1e9)) == pytest.approx([1 / 3] * 3)

    def test_groupdro_adds_up(self):
        b = make("groupdro", eta=0.1)
        weights(b)
        assert weights(b, 2 * L) == pytest.approx((3 * torch.softmax(0.1 * 3 * L, 0)).tolist(), rel=1e-6)

    def test_imtl_l_brings_losses_to_one(self):
        b = make("imtl_l", lr=0.05)
        for _ in range(600):
            w = weights(b)
        assert w == pytest.approx((1 / L).tolist(), rel=1e-3)

    def test_scale_invariant_is_equal_weighting_of_logarithms(self):
        x = torch.nn.Parameter(L.clone())
        polytask.backward(list(x.unbind()), shared=[x], balancer=make("equal", log_losses=True))
        assert x.grad is not None
        assert weights(make("scale_invariant")) == pytest.approx(x.grad.tolist())


def test_rlw_distributions():
    b = make("rlw", seed=1)
    w = torch.tensor([weights(b) for _ in range(4000)])
    assert torch.allclose(w.sum(1), torch.ones(4000))
    assert w.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.015)
    flat = make("rlw", distribution="dirichlet", seed=1)
    w = torch.tensor([weights(flat) for _ in range(4000)])
    assert w.var(0).tolist() == pytest.approx([1 / 18] * 3, rel=0.1)  # that of Dirichlet(1, 1, 1)
    with pytest.raises(InputError, match="rlw draws from one of 'normal', 'uniform', 'dirichlet'"):
        make("rlw", distribution="cauchy")


class TestLDCMTL:
    def test_starts_from_equal_weights_of_losses_measured_by_the_first(self):
        assert weights(make("ldc_mtl")) == pytest.approx((1 / (3 * L)).tolist())

    @pytest.mark.parametrize("scaled", [True, False])
    def test_weights_and_router_are_derivatives_of_one_objective(self, scaled):
        W = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([W], lr=0.01)
        b = make("ldc_mtl", lam=0.3, scaled=scaled, lr=0.01)
        for step in range(12):
            losses = (L * (1 - 0.05 * step * torch.tensor([1.0, 0.3, 0.7]))).requires_grad_()
            sigma, values = torch.softmax(W.double(), 0), losses / L
            tau = sigma if scaled else torch.ones_like(sigma)
            objective = sigma @ values + 0.3 * torch.diff(tau * values).abs().sum()
            optimizer.zero_grad()
            (slope,) = torch.autograd.grad(objective, losses, retain_graph=True)
            objective.backward(inputs=[W])
            assert weights(b, losses.detach()) == pytest.approx(slope.tolist(), rel=1e-5)
            optimizer.step()

    def test_only_gaps_count_for_a_high_price(self):
        b = make("ldc_mtl", lam=1e6, scaled=False)
        weights(b)
        w = torch.tensor(weights(b, L * torch.tensor([1.0, 0.5, 0.2]))) * L
        assert (w / w[0]).tolist() == pytest.approx([1, 0, -1], abs=1e-5)


class TestInverse:
    def test_formula(self):
        z = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
        assert weights(make("inverse", nadir=z.tolist())) == pytest.approx((1 / (z - L)).tolist())

    def test_measures_by_the_first_losses(self):
        b = make("inverse")
        assert weights(b) == pytest.approx((1 / L).tolist())
        assert weights(b, 0.5 * L) == pytest.approx((1 / (1.5 * L)).tolist())

    def test_beyond_the_nadir_the_pull_is_bounded(self):
        assert weights(make("inverse", nadir=1.0)) == pytest.approx([2.0, 1000.0, 1000.0])

    def test_one_nadir_a_task(self):
        with pytest.raises(InputError, match="inverse has 2 nadirs for 3 tasks"):
            make("inverse", nadir=[1.0, 2.0]).bind(["a", "b", "c"])

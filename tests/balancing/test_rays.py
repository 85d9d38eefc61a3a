"""The methods that steer the losses towards the ray of a preference.

The stored weights were found by cvxpy 1.9 with Clarabel 0.11 at tolerances of 1e-12, from the papers' problems written with the
gradients themselves; the methods here see their inner products only.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from polytask.balancing import GramianWeighting, make
from polytask.errors import InputError

J1 = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
J2 = torch.tensor([[1, 2, -1, 0.5], [-2, 0.5, 1, 1], [0.3, -1, 2, -0.4]], dtype=torch.float64)
L1, L2 = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 3.0], [0.5, 2.0, 1.0]))
EVEN, P = [1.0, 1.0], [0.5, 1.0, 1.5]
ON_RAY = 2 * torch.tensor(P, dtype=torch.float64)
NEAR_RAY = ON_RAY * torch.tensor([1.01, 0.99, 1.005], dtype=torch.float64)

STORED = [
    ("epo", {}, J1, L1, EVEN, [0.02815916, 0.97184084]),
    ("epo", {}, J2, L2, P, [0.0, 1.0, 0.0]),
    ("epo", {}, J2, ON_RAY, P, [0.22569279, 0.67050757, 0.10379964]),
    ("epo", {}, J2, NEAR_RAY, P, [0.41306795, 0.30956384, 0.27736821]),
    ("ferero", {}, J1, L1, EVEN, [0.42323544, 0.57676456]),
    ("ferero", {}, J2, L2, P, [0.49219615, 0.6824718, 0.38095342]),
    ("ferero", {}, J2, ON_RAY, P, [0.1828729, 0.07785801, 0.22047036]),
    ("wc_mgda", {"u": 3.0}, J1, L1, EVEN, [0.57700339, 0.42299661]),
    ("wc_mgda", {"u": 3.0}, J2, L2, P, [0.34859619, 0.28795414, 0.35849851]),
    ("wc_mgda", {"u": 0.3}, J2, ON_RAY, P, [0.36458293, 0.15592117, 0.44119158]),
]


def weights(
    name: str, J: torch.Tensor, losses: torch.Tensor, preference: list[float], **options: object
) -> list[float]:
    balancer = make(name, preference=preference, **options)
    assert isinstance(balancer, GramianWeighting)
    return balancer.weights(J @ J.T, losses).tolist()


@pytest.mark.parametrize(("name", "options", "J", "losses", "preference", "stored"), STORED)
@pytest.mark.parametrize("c", [1.0, 1e-6])
def test_stored_weights(name, options, J, losses, preference, stored, c):
    assert weights(name, c * J, losses, preference, **options) == pytest.approx(stored, abs=2e-6)


def test_stored_directions_of_pmgda():
    d = make("pmgda", preference=EVEN).direction(J1, L1)
    assert d.tolist() == pytest.approx([5.02692749, 0.86312892, 0.86312892], rel=1e-6)
    d = make("pmgda", preference=P).direction(J2, L2)
    assert d.tolist() == pytest.approx([-1.94862959, 0.77986334, 0.19123136, 1.04491178], rel=1e-6)


@pytest.mark.parametrize("name", ["epo", "ferero", "pmgda", "pmtl", "wc_mgda"])
def test_losses_are_asked_for(name):
    with pytest.raises(InputError, match=f"{name} steers the losses towards the ray of the preference: give losses="):
        make(name).direction(J2)


@pytest.mark.parametrize("preference", [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize(
    ("name", "options"),
    [("epo", {}), ("ferero", {}), ("ferero", {"single_loop": True}), ("pmgda", {"epsilon": 1e-3}), ("wc_mgda", {})],
)
def test_descent_ends_where_the_ray_meets_the_front(name, options, preference):
    """Distances to three corners: the front is known to be the triangle, and every ray within it has one Pareto-optimal point."""
    corners = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([0.9, -0.4, 0.3], dtype=torch.float64)
    balancer = make(name, preference=preference, **options)
    for rate in torch.linspace(0.3, 0.005, 150).tolist():
        J = x - corners
        x = x - rate * balancer.direction(J, 0.5 * (J * J).sum(1))
    F, ray = 0.5 * ((x - corners) ** 2).sum(1), torch.tensor(preference, dtype=torch.float64)
    assert float(F @ ray / F.norm() / ray.norm()) > np.cos(np.deg2rad(1.0))
    assert float(x.sum()) == pytest.approx(1.0, abs=0.02)  # in the plane of the corners, that is on the front


class TestEPO:
    def test_balancing_does_not_raise_the_loss_furthest_out(self):
        for seed in range(30):
            rng = np.random.default_rng(seed)
            G, L = torch.as_tensor(rng.standard_normal((4, 6))), torch.as_tensor(rng.uniform(0.2, 3, 4))
            w = make("epo").weights(G @ G.T, L)
            assert float(w.sum()) == pytest.approx(1.0)
            assert float(w.min()) >= 0
            assert float((G @ (w @ G))[L.argmax()]) >= -1e-7

    def test_on_the_ray_no_loss_rises(self):
        for seed in range(30):
            G = torch.as_tensor(np.random.default_rng(seed).standard_normal((3, 5)))
            d = make("epo", preference=P).direction(G, ON_RAY)
            assert float((G @ d).min()) >= -1e-7

    def test_where_no_direction_is_left_the_shortest_vector_is_taken(self):
        """60 gradients in 20 dimensions oppose one another; a loss that depends on what none of them touches still falls."""
        rng = np.random.default_rng(0)
        G = torch.as_tensor(rng.standard_normal((60, 20)) * 10 ** rng.uniform(-3, 3, (60, 1)))
        w = make("epo").weights(G @ G.T, torch.ones(60))
        sizes = torch.linalg.vector_norm(G, dim=1)
        assert float(w.min()) >= 0
        assert float(w.sum()) == pytest.approx(1.0)
        assert float(torch.linalg.vector_norm(w @ G)) <= 1e-6 * float(w @ sizes)
        apart = torch.block_diag(G, sizes[-1:, None])
        d = make("epo").direction(apart, torch.ones(61))
        assert float(d[-1]) > 0
        assert float(torch.linalg.vector_norm(d[:-1])) <= 1e-6 * float(sizes.max())

    def test_refuses_no_tolerance(self):
        with pytest.raises(InputError, match="epsilon of epo is positive"):
            make("epo", epsilon=0.0)


class TestFERERO:
    def test_on_the_ray_losses_fall_in_proportion_to_it(self):
        d = make("ferero", preference=P, ridge=1e-9).direction(J2, ON_RAY)
        falls = J2 @ d
        assert (falls / falls.sum()).tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], rel=1e-6)
        assert float(falls.min()) > 0

    def test_off_the_ray_it_returns_at_the_asked_rate(self):
        """Across the ray, C w = c h for gradients of mean squared length 1."""
        J = J2 / (J2 * J2).sum(1).mean().sqrt()
        u = torch.tensor(P, dtype=torch.float64)
        u = u / u.norm()
        for c in (0.5, 2.0):
            across = J @ make("ferero", preference=P, ridge=1e-9, c=c).direction(J, L2)
            across = across - (across @ u) * u
            h = L2 / L2.norm()
            assert torch.allclose(across, c * (h - (h @ u) * u), rtol=1e-6)

    def test_a_heavy_ridge_leaves_mgda(self):
        d = make("ferero", preference=P, ridge=1e9).direction(J2, L2)
        assert torch.allclose(d, make("mgda").direction(J2), atol=1e-6)

    def test_the_single_loop_ends_at_the_solution(self):
        balancer = make("ferero", preference=P, single_loop=True, lr=0.4)
        for _ in range(4000):
            d = balancer.direction(J2, L2)
        assert torch.allclose(d, make("ferero", preference=P).direction(J2, L2), rtol=1e-4)


class TestWCMGDA:
    def test_without_gradients_it_is_the_chebyshev_scalarization(self):
        assert (
            weights("wc_mgda", J2, L2, P, u=0.0)
            == make("tchebycheff", preference=P, modified=True).weights(L2).tolist()
        )

    def test_without_losses_it_is_mgda_of_the_weighted_gradients(self):
        d = make("wc_mgda", preference=P, u=1e7).direction(J2, L2)
        assert torch.allclose(d, make("mgda").direction(J2 / torch.tensor(P)[:, None].double()), atol=1e-6)


class TestPMGDA:
    def test_on_the_ray_it_is_mgda(self):
        d = make("pmgda", preference=P).direction(J2, ON_RAY)
        assert torch.allclose(d, make("mgda").direction(J2))

    def test_a_correction_goes_far_enough_towards_the_ray(self):
        u = torch.tensor(P, dtype=torch.float64)
        h = L2 - (L2 @ u) * u / (u @ u)
        g_h = h @ J2
        size = float((J2 * J2).sum(1).mean().sqrt())
        for sigma in (0.5, 0.95, 1.0):
            d = make("pmgda", preference=P, sigma=sigma).direction(J2, L2) / size
            assert float(d @ g_h / g_h.norm()) >= sigma - 1e-6

    def test_the_worst_gain_falls_the_further_a_correction_goes(self):
        gains = [
            float((J2 @ make("pmgda", preference=P, sigma=s).direction(J2, L2)).min()) for s in (0.2, 0.6, 0.9, 1.0)
        ]
        assert gains == sorted(gains, reverse=True)
        assert gains[0] > gains[-1]


class TestPMTL:
    others = ([1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.1, 0.1, 1.0])

    def test_among_ones_own_losses_it_is_mgda(self):
        d = make("pmtl", preference=[1, 1, 1], others=self.others).direction(J2, torch.ones(3).double())
        assert torch.allclose(d, make("mgda").direction(J2))

    def test_first_stage_moves_away_from_the_only_nearer_ray(self):
        losses = torch.tensor([0.1, 2.0, 0.1], dtype=torch.float64)
        u, other = torch.ones(3).double() / 3**0.5, torch.tensor(self.others[1]).double()
        d = make("pmtl", others=self.others).direction(J2, losses)
        assert torch.allclose(d, (other / other.norm() - u) @ J2)

    def test_second_stage_looks_at_gradients_and_broken_constraints(self):
        losses = torch.tensor([0.1, 2.0, 0.1], dtype=torch.float64)
        balancer = make("pmtl", others=self.others, warmup=1)
        balancer.direction(J2, losses)
        u, other = torch.ones(3).double() / 3**0.5, torch.tensor(self.others[1]).double()
        rows = torch.cat([J2, ((other / other.norm() - u) @ J2)[None]])
        assert torch.allclose(balancer.direction(J2, losses), make("mgda").direction(rows))

    def test_first_stage_ends_for_good_once_no_other_ray_is_nearer(self):
        balancer = make("pmtl", others=self.others)
        off = torch.tensor([0.1, 2.0, 0.1], dtype=torch.float64)
        first = balancer.direction(J2, off)
        balancer.direction(J2, torch.ones(3).double())
        assert not torch.allclose(balancer.direction(J2, off), first)

    def test_refuses_rays_that_are_none(self):
        with pytest.raises(InputError, match="numbers from 0 on, not all 0"):
            make("pmtl", others=[[1.0, -1.0]])
        with pytest.raises(InputError, match=r"the ray \[1.0, 2.0\] of pmtl has 2 numbers for 3 tasks"):
            make("pmtl", others=[[1.0, 2.0]]).bind(["a", "b", "c"])


def problems(count: int):
    """Random gradients of 2 to 9 tasks, some in too few dimensions, with losses and preferences over two decades each."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tasks = int(rng.integers(2, 10))
        G = rng.standard_normal((tasks, max(1, tasks + int(rng.integers(-2, 6))))) + 0.3
        G /= np.sqrt((G * G).sum() / tasks)
        yield G @ G.T, 10 ** rng.uniform(-1, 1, tasks), 10 ** rng.uniform(-1, 1, tasks)


class TestOptimality:
    """The conditions that make a point the solution of a convex problem, on gradients of mean squared length 1."""

    def solved(self, name: str, C: np.ndarray, L: np.ndarray, p: np.ndarray, **options: object) -> np.ndarray:
        balancer = make(name, preference=p.tolist(), **options)
        assert isinstance(balancer, GramianWeighting)
        return balancer.weights(torch.as_tensor(C), torch.as_tensor(L)).numpy()

    def test_ferero(self):
        for C, L, p in problems(60):
            w, u, rho = self.solved("ferero", C, L, p, ridge=0.01), p / np.linalg.norm(p), 0.01
            h, slope = L / np.linalg.norm(L), C @ w
            nu = (h - (h @ u) * u - (slope - (slope @ u) * u)) / rho  # stationary across the ray
            lam = w - nu
            assert lam.min() > -1e-7
            assert lam.sum() == pytest.approx(1, abs=1e-7)
            assert slope[lam > 1e-6].max() == pytest.approx(slope.min(), abs=1e-7)

    @pytest.mark.parametrize("u", [0.01, 0.3, 10.0])
    def test_wc_mgda(self, u):
        for C, L, p in problems(60):
            r = len(p) ** -1 * p.sum() / p
            alpha = self.solved("wc_mgda", C, L, p, u=u) / r
            assert alpha.min() >= 0
            assert alpha.sum() == pytest.approx(1)
            C_r, l_r = C * np.outer(r, r), r * L
            length = np.sqrt(max(alpha @ C_r @ alpha, 0.0) * np.linalg.eigvalsh(C_r)[-1])
            if length > 1e-6:  # elsewhere the norm has no derivative
                slope = u * C_r @ alpha / length - l_r / l_r.max()
                assert slope[alpha > 1e-6].max() == pytest.approx(slope.min(), abs=1e-5)

    @pytest.mark.parametrize("on_ray", [False, True])
    def test_epo(self, on_ray):
        for C, L, p in problems(40):
            if on_ray:
                L = p
            w = self.solved("epo", C, L, p)
            share = L / p / (L / p).sum()
            mu = share @ np.log(len(p) * share)
            Ca = C @ ((np.log(len(p) * share) - mu) * p.mean() / p)
            if on_ray:
                gain, least, A = C.sum(0), np.zeros(len(p)), C
            else:
                limits = np.where(share == share.max(), 0.0, np.where(Ca > 0, -np.inf, Ca))
                gain, least, A = Ca, limits if (Ca > 0).any() else np.zeros(len(p)), C
            rows = np.isfinite(least)
            best = scipy.optimize.linprog(-gain, -A[rows], -least[rows], np.ones((1, len(p))), [1.0])
            if best.status == 0:
                assert gain @ w == pytest.approx(-best.fun, abs=1e-7)
                assert (A @ w - least)[rows].min() >= -1e-8
            else:
                assert w == pytest.approx(p / p.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["epo", "ferero", "pmgda", "pmtl", "wc_mgda"])
def test_no_spread_of_scales_breaks_a_solver(name, dtype):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        tasks = int(rng.integers(1, 8))
        G = rng.standard_normal((tasks, max(1, tasks - seed % 3))) * 10 ** rng.uniform(-4, 4, (tasks, 1))
        if tasks > 2:
            G[-1] = (-1) ** seed * G[0]
        preference, L = (10 ** rng.uniform(-2, 2, tasks)).tolist(), 10 ** rng.uniform(-4, 4, tasks)
        d = make(name, preference=preference).direction(torch.as_tensor(G).to(dtype), torch.as_tensor(L).to(dtype))
        assert bool(torch.isfinite(d).all())
        assert float(d.norm()) <= 1e3 * float(np.linalg.norm(G)) * max(1.0, 1 / min(preference))

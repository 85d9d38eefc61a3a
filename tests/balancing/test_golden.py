"""Directions known from elsewhere: the peers' printed figures, and values worked out by hand.

The figures to four or five digits were printed by LibMTL, TorchJD 0.18 and the authors' own code for the same two sets of task gradients.
"""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch

from polytask.balancing import GramianWeighting, make
from polytask.errors import InputError

J1 = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
J2 = torch.tensor([[1, 2, -1, 0.5], [-2, 0.5, 1, 1], [0.3, -1, 2, -0.4]], dtype=torch.float64)
M1, M2 = [0.5, 0.5], [1 / 3] * 3

PRINTED = [
    ("upgrad", {}, J1, [0.2929, 1.90035, 1.90035], 3e-4),  # the peer regularises by 1e-4
    ("upgrad", {}, J2, [0.01004, 0.90131, 1.01256, 0.49763], 3e-4),
    ("mgda", {}, J1, [0, 1, 1], 1e-5),
    ("mgda", {}, J2, [0.18846, 0.48961, 0.59702, 0.21147], 1e-5),
    ("cagrad", {"c": 0.5}, J1, [0.1835, 1.20412, 1.20412], 1e-5),
    ("cagrad", {"c": 0.5}, J2, [0.0856, 0.75688, 0.89539, 0.39517], 1e-5),
    ("imtl_g", {}, J1, [0.0767, 1, 1], 1e-4),
    ("imtl_g", {}, J2, [0.17857, 0.50052, 0.58845, 0.2192], 1e-5),
    ("nash_mtl", {}, J1, [0.07658, 0.99853, 0.99853], 1e-5),
    ("nash_mtl", {}, J2, [0.10457, 1.0545, 1.25219, 0.55598], 1e-5),
    ("fairgrad", {"alpha": 1}, J1, [0.07658, 0.99853, 0.99853], 1e-5),
    ("fairgrad", {"alpha": 2}, J1, [0.03127, 0.79082, 0.79082], 1e-5),
    ("fairgrad", {"alpha": 2}, J2, [0.19801, 0.92536, 1.1078, 0.45221], 1e-5),
    ("pcgrad", {"order": "ascending"}, J1, [0.5848, 3.80117, 3.80117], 1e-5),
    ("pcgrad", {"order": "ascending"}, J2, [-0.21461, 2.57983, 3.05186, 1.52054], 1e-5),
    ("db_mtl", {}, J1, [0.18813, 2.45297, 2.45297], 1e-5),
    ("db_mtl", {}, J2, [-0.67267, 1.40891, 2.18218, 1.06356], 1e-5),
    ("dualproj", {}, J1, [0.55632, 1.11092, 1.11092], 1e-3),  # the peer regularises
    ("dualproj", {}, J2, [-0.23333, 0.5, 0.66667, 0.36667], 1e-5),
    ("config", {}, J1, [0.15881, 2.07061, 2.07061], 1e-5),
    ("config", {}, J2, [0.53931, 1.51163, 1.77718, 0.66202], 1e-5),
    ("sdmgrad", {"lam": 0.3}, J1, [0, 1, 1], 1e-5),
    ("sdmgrad", {"lam": 0.3}, J2, [0.18846, 0.48961, 0.59702, 0.21147], 1e-5),
    ("gradvac", {"order": "ascending"}, J1, [0.5848, 3.8012, 3.8012], 1e-5),
    # printed for the mean of the aligned gradients; here they are added
    ("aligned_mtl", {}, J1, [2 * v for v in (0.21328, 0.96733, 0.96733)], 1e-5),
    ("aligned_mtl", {}, J2, [3 * v for v in (0.02626, 0.45369, 0.55568, 0.24703)], 2e-5),
    ("aligned_mtl", {"scale": "rmse"}, J1, [2 * v for v in (0.57638, 2.61417, 2.61417)], 1e-5),
    ("aligned_mtl", {"scale": "rmse"}, J2, [3 * v for v in (0.04858, 0.83927, 1.02794, 0.45698)], 1e-5),
]


@pytest.mark.parametrize(("name", "options", "J", "printed", "relative"), PRINTED)
def test_printed_directions(name, options, J, printed, relative):
    d = make(name, **options).direction(J)
    expected = torch.tensor(printed, dtype=J.dtype)
    assert float((d - expected).norm()) <= relative * float(expected.norm()) + 5e-6


PRINTED_WEIGHTS = [
    ("mgda", {}, [0.6, 0.4]),
    ("imtl_g", {}, [0.59233, 0.40767]),
    ("nash_mtl", {}, [0.59146, 0.40707]),
    ("fairgrad", {"alpha": 1}, [0.591461, 0.407071]),
    ("pcgrad", {}, [2.2222, 1.5789]),
    ("cagrad", {}, [0.7041, 0.5]),
]


@pytest.mark.parametrize(("name", "options", "printed"), PRINTED_WEIGHTS)
def test_printed_weights(name, options, printed):
    w = make(name, **options).weights(J1 @ J1.T)
    assert w.tolist() == pytest.approx(printed, rel=5e-5)


def test_upgrad_by_hand():
    # g1 + (22/38) g2 and g2 + (22/18) g1 are the two projections
    w = make("upgrad").weights(J1 @ J1.T)
    assert w.tolist() == pytest.approx([(1 + 22 / 18) / 2, (1 + 22 / 38) / 2], rel=1e-10)


def test_nash_solves_its_equation_and_has_its_length():
    for J in (J1, J2, 1e-6 * J2, 1e5 * J1):
        w = make("nash_mtl").weights(J @ J.T)
        assert torch.allclose(J @ J.T @ w, 1 / w, rtol=1e-9)
        assert float((w @ J).norm()) == pytest.approx(math.sqrt(len(J)), rel=1e-9)


def test_graddrop_expectation():
    # P is 0.6 for the first coordinate of J1: on average it passes 0.6 * 6 - 0.4 * 4
    b = make("graddrop", seed=3)
    mean = torch.stack([b.direction(J1) for _ in range(2000)]).mean(0)
    assert mean.tolist() == pytest.approx([2.0, 2.0, 2.0], abs=0.35)
    b = make("graddrop", seed=4)
    mean = torch.stack([b.direction(J2) for _ in range(2000)]).mean(0)
    assert mean.tolist() == pytest.approx([-0.7, 1.5, 2.0, 1.1], abs=0.16)


class TestLimits:
    def test_cagrad_without_radius_is_the_mean(self):
        assert torch.allclose(make("cagrad", c=0.0).direction(J2), J2.mean(0))

    def test_cagrad_with_a_huge_radius_points_like_mgda(self):
        d, e = make("cagrad", c=1e5).direction(J2), make("mgda").direction(J2)
        assert torch.allclose(d / d.norm(), e / e.norm(), atol=1e-4)

    def test_fairgrad_without_fairness_is_the_sum(self):
        assert torch.allclose(make("fairgrad", alpha=1e-4).direction(J2), J2.sum(0), rtol=1e-2)

    def test_sdmgrad_between_mgda_and_the_mean(self):
        assert torch.allclose(make("sdmgrad", lam=0.0).direction(J1), make("mgda").direction(J1))
        assert torch.allclose(make("sdmgrad", lam=1e6).direction(J1), J1.mean(0), atol=1e-5)

    def test_gradvac_without_memory_is_pcgrad(self):
        for seed in range(5):
            vaccinated, surgical = make("gradvac", beta=0.0, seed=seed), make("pcgrad", seed=seed)
            assert torch.allclose(vaccinated.direction(J2), surgical.direction(J2))

    def test_dualproj_leaves_a_mean_without_conflict(self):
        assert torch.allclose(make("dualproj").direction(J2), J2.mean(0))

    def test_config_has_equal_cosines(self):
        d = make("config").direction(J2)
        cosines = J2 @ d / J2.norm(dim=1)
        assert torch.allclose(cosines, cosines[:1].expand(3), rtol=1e-9)
        assert float(d.norm()) == pytest.approx(float((J2 @ d / d.norm()).sum()))

    def test_cr_mogm_forgets_its_start(self):
        b = make("cr_mogm", alpha=0.5)
        for _ in range(60):
            d = b.direction(J2)
        assert torch.allclose(d, make("mgda").direction(J2), atol=1e-9)

    def test_extreme_fairness_equalises_improvements(self):
        d = make("fairgrad", alpha=60.0).direction(J2)
        gains = J2 @ d
        assert float(gains.max() / gains.min()) < 1.03

    def test_fairgrad_one_is_nash(self):
        assert torch.allclose(make("fairgrad", alpha=1.0).direction(J2), make("nash_mtl").direction(J2), rtol=1e-9)

    def test_aligned_of_orthonormal_gradients_is_their_sum(self):
        Q = torch.linalg.qr(torch.arange(20.0, dtype=torch.float64).reshape(5, 4).sin())[0].T
        for scale in ("min", "median", "rmse"):
            assert torch.allclose(make("aligned_mtl", scale=scale).direction(Q), Q.sum(0))

    def test_imtl_g_projects_equally(self):
        d = make("imtl_g").direction(J2)
        cosines = J2 @ d / J2.norm(dim=1)
        assert torch.allclose(cosines, cosines[:1].expand(3), rtol=1e-9)

    def test_db_mtl_gives_every_gradient_the_longest_length(self):
        w = make("db_mtl").weights(J2 @ J2.T)
        assert torch.allclose(w * J2.norm(dim=1), J2.norm(dim=1).max().expand(3))


class TestSmallGradients:
    """Peers with absolute thresholds lose the non-conflict guarantee, or stop altogether, when gradients are small."""

    @pytest.mark.parametrize("c", [1e-2, 1e-3, 1e-5, 1e-8])
    @pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "nash_mtl", "fairgrad"])
    def test_no_conflict(self, name, c):
        d = make(name).direction(c * J1)
        assert float((c * J1 @ d).min()) >= -1e-12 * c * float(d.norm())

    @pytest.mark.parametrize("c", [1e-2, 1e-3, 1e-5, 1e-8])
    def test_cagrad_does_not_stop(self, c):
        assert (make("cagrad").direction(c * J1) / c).tolist() == pytest.approx([0.1835, 1.20412, 1.20412], rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_low_precision(self, dtype):
        b = make("upgrad")
        assert isinstance(b, GramianWeighting)
        d = b.direction((1e-12 * J1).to(dtype)).double() * 1e12
        assert d.tolist() == pytest.approx([0.2924, 1.9006, 1.9006], rel=0.05)


class TestGradVac:
    def test_raises_the_cosine_to_its_target(self):
        b = make("gradvac", beta=0.0, order="ascending")
        b.bind(["a", "b"])
        b.state["rho"][:] = 0.5
        g1, g2 = J1
        w = b.weights(J1 @ J1.T)
        # the first gradient ends at cosine 1/2 with the second, the second with the first
        phi = float(g1 @ g2 / (g1.norm() * g2.norm()))
        lift = (0.5 * math.sqrt(1 - phi**2) - phi * math.sqrt(0.75)) / math.sqrt(0.75)
        a, c = lift * float(g1.norm() / g2.norm()), lift * float(g2.norm() / g1.norm())
        assert w.tolist() == pytest.approx([1 + c, 1 + a])
        for corrected, other in ((g1 + a * g2, g2), (g2 + c * g1, g1)):
            assert float(corrected @ other / corrected.norm() / other.norm()) == pytest.approx(0.5)

    def test_remembers_cosines(self):
        b = make("gradvac", beta=0.1, order="ascending")
        J = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
        b.direction(J)
        assert b.state["rho"][0, 1] == pytest.approx(0.1 * 0.6)
        b.direction(J)
        assert b.state["rho"][0, 1] == pytest.approx(0.9 * 0.06 + 0.1 * 0.6)


class TestMGDANormalization:
    @pytest.mark.parametrize("kind", ["l2", "loss", "loss+"])
    def test_is_mgda_of_the_normalized_gradients(self, kind):
        values = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
        by = {"l2": J2.norm(dim=1), "loss": values, "loss+": values * J2.norm(dim=1)}[kind]
        d = make("mgda", normalization=kind).direction(J2, values)
        assert torch.allclose(d, make("mgda").direction(J2 / by[:, None]))


class TestRobust:
    def test_krum_ignores_an_outlier(self):
        J = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.9, 0.0], [-50.0, 80.0]], dtype=torch.float64)
        w = make("krum", outliers=1, selected=3).weights(J @ J.T)
        assert w.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
        # two neighbours count: the middle one is nearest to its two
        assert make("krum", outliers=0).weights(J @ J.T).tolist() == pytest.approx([0, 0, 1, 0])

    def test_trimmed_mean(self):
        J = torch.tensor([[1.0, 9.0], [2.0, -7.0], [3.0, 1.0], [90.0, 2.0], [-5.0, 3.0]])
        assert make("trimmed_mean").direction(J).tolist() == [2.0, 2.0]
        assert torch.allclose(make("trimmed_mean", trim=0).direction(J), J.mean(0))
        assert make("trimmed_mean", trim=9).direction(J).tolist() == [2.0, 2.0]


class TestMemories:
    values = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

    def test_metabalance_follows_lengths(self):
        b = make("metabalance", main=1, relax=0.7, beta=0.9)
        n = J2.norm(dim=1)
        assert torch.allclose(b.weights(J2 @ J2.T), 0.7 * n[1] / n + 0.3)
        m = 0.9 * n + 0.1 * (3 * n * torch.tensor([1.0, 2.0, 1.0]))
        J = 3 * J2 * torch.tensor([[1.0], [2.0], [1.0]])
        assert torch.allclose(b.weights(J @ J.T), 0.7 * m[1] / m + 0.3)

    def test_metabalance_refuses_an_unknown_main_task(self):
        with pytest.raises(InputError, match="'income' of metabalance is none of a, b"):
            make("metabalance", main="income").bind(["a", "b"])

    def test_gradnorm_balances_lengths(self):
        """With equal pace the weighted gradients end equally long."""
        b = make("gradnorm")
        for _ in range(1500):
            w = b.weights(J2 @ J2.T, self.values)
        lengths = w * J2.norm(dim=1)
        assert lengths.tolist() == pytest.approx([float(lengths.mean())] * 3, rel=0.03)
        assert float(w.sum()) == pytest.approx(3)

    def test_gradnorm_favours_the_slow(self):
        b = make("gradnorm")
        b.weights(J2 @ J2.T, self.values)
        for _ in range(1500):
            w = b.weights(J2 @ J2.T, self.values * torch.tensor([1.0, 0.5, 0.25]))
        lengths = w * J2.norm(dim=1)
        pace = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
        target = lengths.mean() * (pace / pace.mean()) ** 1.5
        # the targets do not sum to the lengths: what can be balanced is their order
        assert float(lengths[0]) > float(lengths[1]) > float(lengths[2])
        assert float((lengths - target).abs().sum()) < 0.5 * float(lengths.sum())

    def test_imtl_scales_then_projects(self):
        b = make("imtl")
        first = b.weights(J2 @ J2.T, self.values)
        assert torch.allclose(first, make("imtl_g").weights(J2 @ J2.T))
        for _ in range(800):
            w = b.weights(J2 @ J2.T, self.values)
        scaled = J2 / self.values[:, None]
        expected = make("imtl_g").weights(scaled @ scaled.T) / self.values
        assert torch.allclose(w, expected, rtol=1e-2)

    def test_moco_first_step(self):
        unit = J2 / J2.norm(dim=1, keepdim=True) * self.values[:, None]
        Y = 0.5 * unit
        w = torch.full((3,), 1 / 3, dtype=torch.float64)
        w = w - 0.1 * (Y @ Y.T @ w)
        w = w + (1 - w.sum()) / 3  # the projection, as long as nothing turns negative
        assert torch.allclose(make("moco").direction(J2, self.values), w @ Y)

    def test_moco_settles_on_mgda(self):
        b = make("moco", beta=1.0, gamma=5.0)
        for _ in range(3000):
            d = b.direction(J2, J2.norm(dim=1))
        assert torch.allclose(d, make("mgda").direction(J2), atol=1e-3)

    def test_excess_mtl_second_step(self):
        b = make("excess_mtl", eta=0.5)
        assert torch.allclose(b.direction(J2), J2.sum(0))
        first = J2.abs().sum(1)
        J = J2 * torch.tensor([[1.0], [2.0], [0.5]])
        excess = (J**2 / (J2**2 + J**2).sqrt()).sum(1)
        w = 3 * torch.softmax(0.5 * excess / first, 0)
        assert torch.allclose(b.direction(J), w @ J, rtol=1e-6)

    @pytest.mark.parametrize("name", ["moco", "excess_mtl"])
    def test_memory_of_other_coordinates_is_refused(self, name):
        b = make(name)
        b.direction(J2, self.values)
        with pytest.raises(InputError, match=r"remembers gradients of 4 coordinates and was given 2.*level='exact'"):
            b.direction(J2[:, :2], self.values)


def test_weights_serve_preferences():
    # Nash: (Cw)_i w_i is the share of the bargain
    C = J2 @ J2.T
    w = make("nash_mtl", preference=[1, 2, 3]).weights(C)
    assert (w * (C @ w)).tolist() == pytest.approx([0.5, 1.0, 1.5], rel=1e-9)
    # DB-MTL: lengths in proportion to the preference
    w = make("db_mtl", preference=[1, 2, 3]).weights(C)
    lengths = w * J2.norm(dim=1)
    assert (lengths / lengths[0]).tolist() == pytest.approx([1, 2, 3])
    # IMTL-G: projections in proportion to the preference
    d = make("imtl_g", preference=[1, 2, 3]).direction(J2)
    projections = J2 @ d / J2.norm(dim=1)
    assert (projections / projections[0]).tolist() == pytest.approx([1, 2, 3])


class TestPCD:
    def test_guarantees_progress_to_the_others(self):
        d = make("pcd", main=1, tau=0.1).direction(J2)
        n = J2.norm(dim=1)
        assert float(d.norm()) == pytest.approx(float(n[1]))
        assert float((J2 @ J2[1]).min()) < 0 < float((J2 @ d).min())

    def test_solves_its_quadratic_program(self):
        unit = (J2 / J2.norm(dim=1, keepdim=True)).numpy()
        rows, g = unit[1:], unit[0]
        found = scipy.optimize.minimize(
            lambda d: ((d - g) ** 2).sum(),
            g,
            constraints={"type": "ineq", "fun": lambda d: rows @ d - 0.5},
            method="SLSQP",
            tol=1e-14,
        )
        d = make("pcd", tau=0.5).direction(J2)
        expected = torch.as_tensor(found.x) / float((found.x**2).sum() ** 0.5)
        assert torch.allclose(d / d.norm(), expected, atol=1e-6)

    def test_without_conflict_the_main_gradient_stands(self):
        J = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        assert torch.allclose(make("pcd").direction(J), J[0])

    def test_constraints_that_exclude_one_another_are_dropped(self, caplog):
        J = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        with caplog.at_level("INFO", logger="polytask"):
            assert torch.allclose(make("pcd", tau=0.1).direction(J), J[0])
        assert "no direction gives every secondary task its share" in caplog.text

    def test_refuses_a_preference(self):
        with pytest.raises(InputError, match="takes no preference"):
            make("pcd", preference=[1, 2])


class TestMConFIG:
    def test_first_step_is_the_sign_of_config(self):
        # m hat is the gradient, the pseudo-gradient is ConFIG's, and dividing by its root mean square leaves signs
        assert torch.allclose(make("m_config").direction(J2), make("config").direction(J2).sign())

    def test_follows_the_published_algorithm_one_task_a_step(self):
        b, config = make("m_config"), make("config")
        names = ["a", "b", "c"]
        b.bind(names)
        m, seen = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        common = v = torch.zeros(4, dtype=torch.float64)
        t = 0
        for step in range(12):
            k = step % 3
            g = J2[k] * (1 + 0.1 * step) + 0.05 * step
            b.bind([names[k]])
            d = b.direction(g[None])
            m[k] = 0.9 * m[k] + 0.1 * g
            seen[k] += 1
            if step < 2:
                assert not bool(d.any())
                continue
            t += 1
            u = config.direction(m / (1 - 0.9**seen))
            after = u * (1 - 0.9**t)
            v = 0.999 * v + 0.001 * ((after - 0.9 * common) / 0.1) ** 2
            common = after
            assert torch.allclose(d, u / (v / (1 - 0.999**t)).sqrt(), rtol=1e-9)


def test_famo_without_a_second_look_takes_the_next_losses_for_it():
    """The free variant on a batch that comes again is the exact one."""
    first, second = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.9, 1.9, 3.0])
    free, exact = make("famo", second_look=False), make("famo")
    assert (free.needs_second_evaluation, exact.needs_second_evaluation) == (False, True)
    for balancer in (free, exact):
        balancer.bind(["a", "b", "c"])
        balancer.weights(first)
    exact.after_step(dict(zip("abc", second, strict=True)))
    torch.testing.assert_close(free.weights(second), exact.weights(second), rtol=0, atol=0)
    assert not torch.equal(free.state["xi"], torch.zeros(3))

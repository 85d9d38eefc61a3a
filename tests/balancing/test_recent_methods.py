"""GradOPS, IMGrad, SON-GOKU and DB-MTL's memory against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from polytask.balancing import make
from polytask.errors import InputError

from .conftest import gradients

J1 = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
J2 = torch.tensor([[1, 2, -1, 0.5], [-2, 0.5, 1, 1], [0.3, -1, 2, -0.4]], dtype=torch.float64)


class TestGradOPS:
    def test_projects_what_opposes_another_gradient_off_the_span_of_all_others(self):
        for seed in range(20):
            J = gradients(seed, 4, 9)
            expected = torch.zeros(9, dtype=torch.float64)
            for i in range(4):
                others = J[[j for j in range(4) if j != i]]
                inside = others.T @ torch.linalg.lstsq(others.T, J[i]).solution
                expected += J[i] - inside if float((others @ J[i]).min()) < 0 else J[i]
            assert torch.allclose(make("gradops").direction(J), expected)

    def test_of_two_gradients_it_is_pcgrad(self):
        assert torch.allclose(make("gradops").direction(J1), make("pcgrad").direction(J1))

    def test_without_conflict_it_is_the_sum(self):
        J = torch.tensor([[1.0, 0.2], [0.3, 1.0], [1.0, 1.0]], dtype=torch.float64)
        assert torch.allclose(make("gradops").direction(J), J.sum(0))

    def test_any_positive_weights_keep_every_loss_from_rising(self):
        for preference in ([1, 1, 1], [100, 1, 1], [1, 30, 0.1]):
            assert float((J2 @ make("gradops", preference=preference).direction(J2)).min()) >= -1e-12

    @pytest.mark.parametrize("alpha", [-3.0, -1.0, 0.5, 2.0])
    def test_powers_of_progress_weigh_what_is_left(self, alpha):
        for seed in range(10):
            J = gradients(seed, 4, 9)
            left = torch.zeros_like(J)
            for i in range(4):
                others = J[[j for j in range(4) if j != i]]
                inside = others.T @ torch.linalg.lstsq(others.T, J[i]).solution
                left[i] = J[i] - inside if float((others @ J[i]).min()) < 0 else J[i]
            progress = (J @ left.sum(0) / J.square().sum(1)).clamp_min(0)
            w = torch.clamp(progress, min=1e-3 * float(progress.mean())) ** alpha
            d = make("gradops", alpha=alpha).direction(J)
            assert torch.allclose(d, (4 * w / w.sum()) @ left)
            assert float((J @ d).min()) >= -1e-12

    def test_the_power_chooses_whom_to_favour(self):
        behind, plain, ahead = (make("gradops", alpha=a).direction(J2) for a in (-2.0, 0.0, 2.0))
        progress = J2 @ plain / J2.square().sum(1)
        worst, best = int(progress.argmin()), int(progress.argmax())
        for favoured, i in ((behind, worst), (ahead, best)):
            gains = J2 @ favoured / (J2 @ plain)
            assert int(gains.argmax()) == i

    def test_progress_does_not_depend_on_the_scale_of_the_losses(self):
        d, e = (make("gradops", alpha=-1.5).direction(c * J2) for c in (1.0, 1e-6))
        assert torch.allclose(e, 1e-6 * d, rtol=1e-9, atol=0)

    def test_a_gradient_within_the_span_of_the_others_leaves_nothing(self):
        J = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -3.0]], dtype=torch.float64)
        assert float(make("gradops").direction(J).norm()) < 1e-9


class TestIMGrad:
    @pytest.mark.parametrize("c", [0.2, 0.5, 2.0])
    def test_solves_its_problem(self, c):
        for seed in range(15):
            J = gradients(seed, 3, 6)
            C, u = (J @ J.T).numpy(), np.full(3, 1 / 3)
            g_0, g_m = J.mean(0), make("mgda").direction(J)
            cos, size = float(g_0 @ g_m / g_0.norm() / g_m.norm()), float(g_0.norm())
            found = [
                scipy.optimize.minimize(
                    lambda w, C=C, u=u, cos=cos, size=size: (
                        (1.5 - cos) * w @ C @ u + cos * c * size * np.sqrt(max(w @ C @ w, 0))
                    ),
                    start,
                    bounds=[(0, 1)] * 3,
                    constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                    method="SLSQP",
                    options={"ftol": 1e-15, "maxiter": 300},
                )
                for start in (u, *(0.8 * np.eye(3) + 0.2 / 3))
            ]
            g_w = torch.as_tensor(min(found, key=lambda r: r.fun).x) @ J
            d = make("imgrad", c=c).direction(J)
            assert torch.allclose(d, g_0 + c * g_0.norm() * g_w / g_w.norm(), atol=2e-4 * size)

    def test_where_mean_and_mgda_agree_it_is_cagrad_of_a_larger_ball(self):
        Q = torch.linalg.qr(gradients(1, 5, 5))[0][:3]
        d, e = make("imgrad", c=0.5).direction(Q), make("cagrad", c=0.5).direction(Q)
        assert torch.allclose(d, e)  # both lengthen the mean by a half

    def test_rescaled(self):
        d, e = (make("imgrad", c=0.5, rescale=r).direction(J2) for r in (False, True))
        assert torch.allclose(d, 1.25 * e)

    def test_at_a_stationary_point_the_pull_goes_to_the_gradient_that_opposes_the_mean_most(self):
        J = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        assert make("imgrad", c=0.5).direction(J).tolist() == pytest.approx([0.5, 0.0], rel=1e-3)


class TestSonGoku:
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 2.0]], dtype=torch.float64)

    def test_tasks_that_interfere_take_turns(self):
        b = make("son_goku", refresh=2)
        assert all(torch.equal(b.direction(self.J), self.J.sum(0)) for _ in range(2))
        first, second = (b.direction(self.J) for _ in range(2))
        # the second gradient is longer than the first; the third opposes neither, and takes the first colour
        assert torch.allclose(first, self.J[1] + self.J[2])
        assert torch.allclose(second, self.J[0])

    def test_a_higher_threshold_lets_all_act(self):
        b = make("son_goku", refresh=1, tau=0.999)
        assert all(torch.allclose(b.direction(self.J), self.J.sum(0)) for _ in range(4))

    def test_turns_of_absent_tasks_are_passed_over(self):
        b = make("son_goku", refresh=100)
        b.bind(["a", "b", "c"])
        b.state["colours"][:] = [0, 1, 2]
        b.bind(["b", "c"])
        seen = [b.direction(self.J[1:]).tolist() for _ in range(4)]
        assert seen == [self.J[1].tolist(), self.J[2].tolist()] * 2

    def test_no_colour_holds_two_that_interfere(self):
        for seed in range(20):
            J = torch.as_tensor(np.random.default_rng(seed).standard_normal((8, 4)))
            b = make("son_goku", refresh=1)
            b.direction(J)
            colours = b.state["colours"]
            R = (J @ J.T / J.norm(dim=1) / J.norm(dim=1)[:, None]).numpy()
            assert all(R[i, j] >= -0.25 for i in range(8) for j in range(8) if colours[i] == colours[j])
            assert set(colours) == set(range(max(colours) + 1))

    def test_refuses_thresholds_that_are_no_cosine(self):
        with pytest.raises(InputError, match="son_goku takes tau and beta in"):
            make("son_goku", tau=1.0)


class TestDBMTLMemory:
    def test_without_memory_it_is_db_mtl(self):
        assert torch.allclose(make("db_mtl_ema", beta=0.0).direction(J2), make("db_mtl").direction(J2))

    def test_follows_the_published_algorithm(self):
        b, average = make("db_mtl_ema", beta=0.9, sigma=0.5), torch.zeros_like(J2)
        for t in range(1, 8):
            J = J2 * (1 + 0.2 * t) + 0.1 * t
            average = J + 0.9 / t**0.5 * (average - J)
            n = average.norm(dim=1)
            assert torch.allclose(b.direction(J), (n.max() / n) @ average)

    def test_every_task_counts_its_own_steps(self):
        b = make("db_mtl_ema", sigma=1.0)
        b.bind(["a", "b", "c"])
        b.direction(J2)
        b.bind(["b"])
        b.direction(J2[1:2])
        assert b.state["steps"].tolist() == [1.0, 2.0, 1.0]

    def test_takes_logarithms_unless_told_otherwise(self):
        assert make("db_mtl_ema").log_losses
        with pytest.raises(InputError, match=r"beta in \[0, 1\)"):
            make("db_mtl_ema", beta=1.0)

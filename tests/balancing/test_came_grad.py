"""CAME-Grad against the worked examples and the exact properties of its equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.balancing import make
from polytask.errors import InputError

G = torch.tensor([[-2.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)


def came(w=None, **options):
    return make("came_grad", preference=w, **options)


def rectified(rows, rho):
    """The direction of stage 1."""
    return torch.from_numpy(came(rho=rho).rectify((rows @ rows.T).numpy())) @ rows


@st.composite
def problems(draw):
    k, n = draw(st.integers(2, 6)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((k, n)) * 10 ** rng.uniform(-2, 2, (k, 1))
    return torch.from_numpy(rows), draw(st.floats(0.05, 0.95)), rng


def test_worked_example_with_one_active_task():
    options = {"rho": 0.25, "kappa": 1.0, "eps": 1e-12}
    energy = came([0.8, 0.2], nu=0.0, **options).direction(G)
    torch.testing.assert_close(
        energy, torch.tensor([-2.1208619817, 0.4265494751], dtype=torch.float64), rtol=1e-9, atol=0
    )
    direction = came([0.8, 0.2], nu=0.9, **options).direction(G)
    torch.testing.assert_close(
        direction, torch.tensor([-1.8320861982, -1.0373450527], dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert G[1] @ direction < 0  # fusion may bring conflict back


def test_rectified_direction_of_the_worked_examples():
    u = rectified(G, 0.25)
    torch.testing.assert_close(u, torch.tensor([-1.6677050983, 0.3354101966], dtype=torch.float64), rtol=1e-8, atol=0)
    both = rectified(G, 0.5)
    torch.testing.assert_close(both, torch.tensor([-2.0480, 0.5120], dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(G @ both, torch.full((2,), 3.0721, dtype=torch.float64), rtol=1e-4, atol=0)


def test_worked_example_with_the_defaults_and_weights_as_given():
    direction = came([1.0, 4.0]).direction(G)
    torch.testing.assert_close(direction, torch.tensor([-11.6783, 4.2696], dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(came([10.0, 40.0]).direction(G), 10 * direction)


def test_the_mean_gradient_is_not_weighted():
    # the direction of stage 1 does not know w, its length does
    one, other = came([1.0, 4.0], nu=0.0).direction(G), came([4.0, 1.0], nu=0.0).direction(G)
    torch.testing.assert_close(one / one.norm(), other / other.norm())
    assert not torch.isclose(one.norm(), other.norm())


@settings(max_examples=40, deadline=None)
@given(problems())
def test_norms_and_limits(problem):
    rows, rho, rng = problem
    w = rng.uniform(0.1, 5, len(rows))
    joint = torch.from_numpy(w) @ rows
    # without the paper's epsilon, which shortens a rectified direction that is nearly zero
    energy = came(w.tolist(), rho=rho, nu=0.0, kappa=1.5, eps=0.0).direction(rows)
    torch.testing.assert_close(energy.norm(), 1.5 * joint.norm(), rtol=1e-6, atol=0)
    blended = came(w.tolist(), rho=rho, nu=0.3, kappa=1.5, eps=0.0).direction(rows)
    torch.testing.assert_close(
        blended, 0.7 * energy + 0.3 * 1.5 * joint, rtol=1e-6, atol=1e-9 * float(rows.abs().max())
    )
    assert blended.norm() <= 1.5 * joint.norm() * (1 + 1e-9)
    torch.testing.assert_close(
        came(w.tolist(), rho=rho, nu=1.0, kappa=2.0).direction(rows), 2 * joint, rtol=1e-9, atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_feasible_direction_has_a_better_worst_case(problem):
    rows, rho, rng = problem
    mean = rows.mean(0)
    u = rectified(rows, rho)
    worst = float((rows @ u).min())
    slack = 1e-6 * float(rows.norm(dim=1).max() * u.norm())
    assert worst >= float((rows @ mean).min()) - slack
    noise = torch.from_numpy(rng.standard_normal((300, rows.shape[1])))
    noise *= torch.from_numpy(rng.uniform(0, 1, (300, 1))) ** (1 / rows.shape[1]) / noise.norm(dim=1, keepdim=True)
    feasible = mean + rho * mean.norm() * noise
    assert float((feasible @ rows.T).min(1).values.max()) <= worst + slack


def test_stage_one_may_leave_a_task_with_a_negative_product():
    # the paper says otherwise; in one dimension the ball around the mean may not reach the other side of zero
    rows = torch.tensor([[1.0], [-10.0]], dtype=torch.float64)
    u = rectified(rows, 0.5)
    torch.testing.assert_close(u, torch.tensor([-2.25], dtype=torch.float64))
    assert rows[0] @ u < 0


def test_dual_minimum_of_two_tasks_agrees_with_a_scalar_search():
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.standard_normal((2, 5)) * 10 ** rng.uniform(-1, 1, (2, 1))
        mean, rho = rows.mean(0), rng.uniform(0.1, 0.9)

        def dual(t, rows=rows, mean=mean, rho=rho):
            g = t * rows[0] + (1 - t) * rows[1]
            return g @ mean + rho * np.linalg.norm(mean) * np.linalg.norm(g)

        found = minimize_scalar(dual, bounds=(0, 1), method="bounded", options={"xatol": 1e-12})
        lowest = min(found.fun, dual(0.0), dual(1.0))
        u = rectified(torch.from_numpy(rows), rho).numpy()
        # no duality gap: the least product of the best direction is the least value of the dual
        np.testing.assert_allclose((rows @ u).min(), lowest, rtol=1e-7, atol=1e-9 * np.linalg.norm(rows) ** 2)


@pytest.mark.parametrize("c", [1e-8, 1e8])
def test_scaling_all_gradients_scales_the_direction(c):
    rows = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        came([1.0, 2.0, 3.0, 4.0]).direction(c * rows) / c, came([1.0, 2.0, 3.0, 4.0]).direction(rows)
    )


def test_permuting_tasks_with_their_weights_changes_nothing():
    rows = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, order = [1.0, 2.0, 3.0, 4.0], [2, 0, 3, 1]
    torch.testing.assert_close(came([w[i] for i in order]).direction(rows[order]), came(w).direction(rows))


def test_a_single_task_is_only_weighted_and_gained():
    row = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(came([2.0], kappa=1.5, nu=0.2).direction(row)[None], 3.0 * row)


def test_degenerate_gradients_never_give_nan():
    opposed = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(
        came([1.0, 4.0]).direction(opposed), 1.5 * (opposed[0] + 4 * opposed[1])
    )  # no mean: the weighted sum
    assert not came().direction(opposed).any()  # no weighted sum either: nothing to do
    proportional = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)  # Pareto-stationary
    assert torch.isfinite(came().direction(proportional)).all()
    with_zero = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(
        came([1.0, 7.0, 2.0]).direction(with_zero), came([1.0, 2.0]).direction(with_zero[[0, 2]])
    )


def test_weights_follow_their_tasks_by_name():
    balancer = came({"report": 1.0, "labels": 4.0})
    balancer.bind(["report", "labels"])
    torch.testing.assert_close(balancer.direction(G), came([1.0, 4.0]).direction(G))


@pytest.mark.parametrize(
    ("option", "value"),
    [("rho", 1.0), ("rho", -0.1), ("kappa", 0.9), ("nu", 1.1), ("eps", -1.0), ("kappa", float("nan"))],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(InputError, match=option):
        came(**{option: value})

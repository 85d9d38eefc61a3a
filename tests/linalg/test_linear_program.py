"""Linear programs against SciPy's HiGHS."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.optimize

from polytask.linalg import correlation, linear_program


def by_highs(c, A, b, a):
    rows = np.isfinite(b)
    return scipy.optimize.linprog(-c, A_ub=-A[rows], b_ub=-b[rows], A_eq=a[None], b_eq=[1.0], method="highs")


@pytest.mark.parametrize("kind", ["mixed", "through the origin", "free", "demanding"])
def test_optimal_as_highs_finds_it_and_infeasible_where_it_finds_none(kind):
    infeasible = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 13))
        G = rng.standard_normal((n, int(rng.integers(1, n + 4)))) * 10.0 ** rng.uniform(-6 * (seed % 2), 0, (n, 1))
        A, c, a = correlation(G @ G.T)[0], rng.uniform(-1, 1, n), rng.uniform(0.01, 1, n)
        b = {
            "mixed": np.where(rng.random(n) < 0.4, -np.inf, rng.uniform(-0.5, 0.3, n)),
            "through the origin": np.zeros(n),
            "free": np.full(n, -np.inf),
            "demanding": rng.uniform(-0.2, 2.0, n),
        }[kind]
        y, expected = linear_program(c, A, b, a), by_highs(c, A, b, a)
        if expected.status != 0:
            infeasible += 1
            assert y is None
            continue
        assert y is not None
        assert y.min() >= 0
        assert float(a @ y) == pytest.approx(1.0, abs=1e-9)
        assert (A @ y - b).min() >= -1e-9
        assert float(c @ y) == pytest.approx(-expected.fun, abs=1e-6)
    assert (infeasible > 0) == (kind in ("mixed", "demanding"))


def test_by_hand():
    """max y0 + 2 y1 on the segment y0 + y1 = 1 with y0 >= 1/4, and one without a feasible point."""
    one = np.ones(2)
    y = linear_program(np.array([1.0, 2.0]), np.eye(2), np.array([0.25, -np.inf]), one)
    assert y is not None
    assert y.tolist() == pytest.approx([0.25, 0.75])
    assert linear_program(one, np.array([[1.0, 0.0]]), np.array([2.0]), one) is None


def test_a_degenerate_program_on_which_the_steepest_column_cycles():
    """Beale's: every first pivot is degenerate. The variable that is missing from his program fills up the sum."""
    A = -np.array([[0.25, -60, -1 / 25, 9, 0], [0.5, -90, -1 / 50, 3, 0], [0, 0, 1, 0, 0]])
    c, b, a = np.array([0.75, -150, 1 / 50, -6, 0]), np.array([0.0, 0.0, -1.0]), np.full(5, 1 / 100)
    y = linear_program(c, A, b, a)
    assert y is not None
    assert float(c @ y) == pytest.approx(1 / 20)


def test_what_rounding_spoils_is_solved_again(monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("polytask.linalg.linear_program"), "_simplex", lambda c, A, b, a: np.ones(2)
    )
    y = linear_program(np.array([1.0, 2.0]), np.eye(2), np.array([0.25, -np.inf]), np.ones(2))
    assert y is not None
    assert y.tolist() == pytest.approx([0.25, 0.75])

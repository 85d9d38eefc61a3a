"""Linear programs against SciPy's HiGHS."""

from __future__ import annotations

import importlib
import itertools
from fractions import Fraction

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


def by_every_vertex(c, A, b, a):
    """The optimum in exact arithmetic, from all choices of variables and equally many constraints; None where no vertex is feasible."""
    n, best = len(c), None
    c, b, a = ([Fraction(float(x)) for x in v] for v in (c, b, a))
    A = [[Fraction(float(x)) for x in row] for row in A]
    for k in range(1, n + 1):
        for columns in itertools.combinations(range(n), k):
            for rows in itertools.combinations(range(len(A)), k - 1):
                M = [[*(A[i][j] for j in columns), b[i]] for i in rows] + [[*(a[j] for j in columns), Fraction(1)]]
                inside = solved(M)
                if inside is None or min(inside) < 0:
                    continue
                y = dict(zip(columns, inside, strict=True))
                if all(sum(row[j] * v for j, v in y.items()) >= bound for row, bound in zip(A, b, strict=True)):
                    value = sum(c[j] * v for j, v in y.items())
                    best = value if best is None else max(best, value)
    return best


def solved(M):
    """Gauss and Jordan on [matrix, right side]; None where singular."""
    M = [list(row) for row in M]
    for k in range(len(M)):
        pivot = next((i for i in range(k, len(M)) if M[i][k] != 0), None)
        if pivot is None:
            return None
        M[k], M[pivot] = M[pivot], M[k]
        M[k] = [x / M[k][k] for x in M[k]]
        for i in range(len(M)):
            if i != k and M[i][k] != 0:
                M[i] = [x - M[i][k] * y for x, y in zip(M[i], M[k], strict=True)]
    return [row[-1] for row in M]


@pytest.mark.parametrize("demand", [0.0, -0.2])
def test_as_exact_arithmetic_finds_it_with_lengths_over_twelve_decades(demand):
    """HiGHS's absolute tolerances see nothing of the short gradients' constraints; fractions do."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 5))
        G = rng.standard_normal((n, 6))
        lengths = 10 ** rng.uniform(-6, 6, n)
        A = correlation(G @ G.T)[0]
        a, c = lengths.min() / lengths, A @ lengths / lengths.max()
        b = demand * rng.random(n)
        y, expected = linear_program(c, A, b, a), by_every_vertex(c, A, b, a)
        assert (y is None) == (expected is None)
        if y is not None:
            assert float(c @ y) == pytest.approx(float(expected), rel=1e-6)
            assert (A @ y - b).min() >= -1e-9 * y.max()


@pytest.mark.parametrize("kind", ["high-dimensional", "rank-deficient", "duplicates", "badly scaled"])
def test_no_point_does_better_than_the_multipliers_allow(kind):
    """100 unknowns: the dual of the program that HiGHS solves bounds every point."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        G = rng.standard_normal((100, 40 if kind == "rank-deficient" else 800))
        if kind == "duplicates":
            G[50:] = G[:50]
        A, _ = correlation(G @ G.T)
        lengths = 10 ** rng.uniform(-1, 1, 100) * (10 ** rng.uniform(-3, 3, 100) if kind == "badly scaled" else 1.0)
        a, c = lengths.min() / lengths, A @ lengths / lengths.max()
        y, found = linear_program(c, A, np.zeros(100), a), by_highs(c, A, np.zeros(100), a)
        assert y is not None
        assert (A @ y).min() >= -1e-9 * y.max()
        assert float(a @ y) == pytest.approx(1.0)
        raised = c - found.ineqlin.marginals @ A  # with these multipliers no y gains more than the best ratio to a
        assert float(c @ y) == pytest.approx(float((raised / a).max()), rel=1e-6, abs=1e-9)


def test_a_variable_that_costs_nothing_of_the_sum():
    """max y1 <= y0 with a = (1, 0): the best vertex of the sum alone leaves a gain, which is taken after all constraints hold."""
    y = linear_program(np.array([0.0, 1.0]), np.array([[1.0, -1.0], [-1.0, 3.0]]), np.zeros(2), np.array([1.0, 0.0]))
    assert y is not None
    assert y.tolist() == pytest.approx([1.0, 1.0])


def test_what_rounding_spoils_is_solved_again(monkeypatch):
    monkeypatch.setattr(importlib.import_module("polytask.linalg.linear_program"), "_vertex", lambda *_: None)
    y = linear_program(np.array([1.0, 2.0]), np.eye(2), np.array([0.25, -np.inf]), np.ones(2))
    assert y is not None
    assert y.tolist() == pytest.approx([0.25, 0.75])

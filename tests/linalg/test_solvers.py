"""The K x K solvers against SciPy, and against the conditions that characterise their solutions."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polytask.linalg import (
    DOUBLE,
    SINGLE,
    conflict_averse,
    correlation,
    definite,
    fair_weights,
    min_norm_point,
    nonnegative_qp,
    opposed,
    project_dual_cone,
    project_simplex,
    simplex_qp,
)
from polytask.linalg.complementarity import _exchanged, _follow
from polytask.linalg.shared_matrix import pull_of, settle


def vectors(seed: int, decades: float = 0.0, low_rank: bool = False, common: float = 0.3) -> np.ndarray:
    """Random gradients: 2 to 12 tasks, lengths over some decades, a duplicate now and then, or fewer dimensions than tasks."""
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(2, 13))
    dimensions = max(1, tasks - int(rng.integers(1, 4))) if low_rank else tasks + int(rng.integers(0, 8))
    G = rng.standard_normal((tasks, dimensions)) + common * rng.standard_normal(dimensions)
    if low_rank and tasks > 2 and seed % 3 == 0:
        G[-1] = G[0]
    return G * 10 ** rng.uniform(-decades / 2, decades / 2, (tasks, 1))


KINDS = {
    "plain": {},
    "badly scaled": {"decades": 12.0},
    "rank-deficient": {"low_rank": True},
    "both": {"decades": 6.0, "low_rank": True},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def many(request):
    return [vectors(seed, **request.param) for seed in range(60)]


class TestMinNormPoint:
    def test_optimality(self, many):
        """<g_i, d> >= |d|^2 for all i, with equality where w_i > 0, up to the rounding of unit vectors."""
        for G in many:
            w = min_norm_point(G @ G.T)
            assert (w >= 0).all()
            assert w.sum() == pytest.approx(1, abs=1e-12)
            n = np.linalg.norm(G, axis=1)
            d, size = w @ G, w @ n
            gap = (G @ d - d @ d) / n
            assert gap.min() >= -1e-6 * size
            assert (w * n * np.abs(gap)).max() <= 1e-6 * size**2

    def test_agrees_with_nnls(self):
        """The nearest point of a cone's slice, by Lawson and Hanson: minimise |G'v|^2 + (1'v - 1)^2."""
        for seed in range(100):
            G = vectors(seed, common=1.0)
            w = min_norm_point(G @ G.T)
            v, _ = scipy.optimize.nnls(np.vstack([G.T, np.ones(len(G))]), np.r_[np.zeros(G.shape[1]), 1.0])
            assert w @ G == pytest.approx(v @ G / v.sum(), rel=1e-6, abs=1e-9)

    def test_special_cases(self):
        assert min_norm_point(np.array([[4.0]])) == pytest.approx([1.0])
        assert min_norm_point(np.ones((2, 2))) == pytest.approx([0.5, 0.5])
        assert min_norm_point(np.array([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx([0.5, 0.5])
        assert min_norm_point(np.diag([1.0, 0.0, 4.0])) == pytest.approx([0, 1, 0])

    @pytest.mark.parametrize("K", [40, 100])
    def test_many_tasks(self, K):
        rng = np.random.default_rng(K)
        for dimensions in (K // 3, K, 3 * K):
            G = rng.standard_normal((K, dimensions)) + 0.2
            w = min_norm_point(G @ G.T)
            d = w @ G
            assert (G @ d).min() >= d @ d - 1e-9 * K


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e3, 1e3)), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_project_simplex(v, total):
    w = project_simplex(v, total)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(total, rel=1e-9)
    # the nearest point: moving mass between positive coordinates changes nothing, and none should move to a zero one
    shift = v - w
    assert shift[w > 0] == pytest.approx(shift.max(), abs=1e-9 * (1 + np.abs(v).max()))


class TestSimplexQP:
    def test_optimality(self, many):
        """The gradient of the objective is least, and the same, wherever w is positive."""
        for seed, G in enumerate(many):
            C, n = G @ G.T, np.linalg.norm(G, axis=1)
            b = n * np.random.default_rng(seed).standard_normal(len(G)) * n.min()
            w = simplex_qp(C, b)
            assert w.sum() == pytest.approx(1)
            slope = C @ w + b
            above = (slope - slope @ w) / n
            assert above.min() >= -1e-6 * (w @ n + n.min())
            assert (w * n * above).max() <= 1e-6 * (w @ n + n.min()) ** 2

    def test_without_linear_term_it_is_the_min_norm_point(self):
        for seed in range(50):
            G = vectors(seed)
            assert simplex_qp(G @ G.T, np.zeros(len(G))) @ G == pytest.approx(min_norm_point(G @ G.T) @ G, abs=1e-9)

    def test_a_large_linear_term_chooses_one(self):
        G = vectors(7)
        b = np.arange(len(G), 0, -1) * 1e6
        assert simplex_qp(G @ G.T, b) == pytest.approx(np.eye(len(G))[-1])


class TestNonnegativeQP:
    @pytest.mark.parametrize("n", [1, 5, 40])
    def test_complementarity(self, n):
        rng = np.random.default_rng(n)
        A = rng.standard_normal((n, n + 3))
        M = correlation(A @ A.T)[0]
        Q = rng.standard_normal((30, n))
        Z = nonnegative_qp(M, Q)
        slack = Z @ M + Q
        assert (Z >= 0).all()
        assert slack.min() >= -1e-9
        assert np.abs(Z * slack).max() <= 1e-8

    def test_agrees_with_nnls(self):
        rng = np.random.default_rng(1)
        for _ in range(100):
            A, b = rng.standard_normal((9, 6)), rng.standard_normal(9)
            expected, _ = scipy.optimize.nnls(A, b)
            assert nonnegative_qp(A.T @ A, -(A.T @ b)[None])[0] == pytest.approx(expected, abs=1e-9)

    def test_any_first_guess_leads_to_the_same_point(self):
        rng = np.random.default_rng(2)
        A = rng.standard_normal((12, 10))
        M, Q = A.T @ A / 10 + 0.1 * np.eye(10), rng.standard_normal((50, 10))
        free = rng.random(Q.shape) < 0.5
        assert nonnegative_qp(M, Q, free) == pytest.approx(nonnegative_qp(M, Q), abs=1e-10)


def hundred(kind: str) -> np.ndarray:
    """Gradients of 100 tasks, of which 100 problems with one matrix are made."""
    rng = np.random.default_rng(8 if kind == "hardly a direction" else 3)
    dimensions = {
        "rank-deficient": 40,
        "few dimensions": 10,
        "square": 100,
        "hardly a direction": 54,
        "one dimension": 1,
    }.get(kind, 700)
    G = rng.standard_normal((100, dimensions))
    if kind == "badly scaled":
        G *= 10 ** rng.uniform(-6, 6, (100, 1))
    if kind == "duplicates":
        G[50:] = G[:50]
    if kind == "opposed pairs":
        G[50:] = -G[:50] * rng.uniform(0.5, 2, (50, 1))
    if kind == "decaying spectrum":
        G /= np.arange(1, dimensions + 1) ** 2
    if kind == "clusters":
        G = G[rng.integers(0, 5, 100)] + 0.1 * G
    if kind == "two camps":
        G += rng.choice([-1.0, 1.0], (100, 1)) * rng.standard_normal(dimensions)
    return G


class TestManyProblems:
    """A hundred rows at once go another way than a few: the same points."""

    @pytest.mark.parametrize(
        "kind",
        [
            "plain",
            "badly scaled",
            "duplicates",
            "opposed pairs",
            "rank-deficient",
            "few dimensions",
            "one dimension",
            "square",
            "hardly a direction",
            "decaying spectrum",
            "clusters",
            "two camps",
        ],
    )
    @pytest.mark.parametrize("precision", [DOUBLE, SINGLE])
    @pytest.mark.parametrize("tasks", [30, 100])
    def test_optimality(self, kind, precision, tasks):
        G = hundred(kind)[100 - tasks :]
        M = definite(correlation(G @ G.T)[0], precision)
        Z = nonnegative_qp(M, M)
        slack, size = Z @ M + M, 1 + Z.max(1, keepdims=True)
        assert (Z >= 0).all()
        assert (slack >= -1e-8 * size).all()
        assert (np.abs(Z * slack) <= 1e-8 * size**2).all()
        assert (Z[slack > 1e-4 * size] == 0).all()  # a combination holds only what binds

    @pytest.mark.parametrize("kind", ["plain", "badly scaled", "rank-deficient", "hardly a direction", "two camps"])
    def test_agrees_with_nnls(self, kind):
        G = hundred(kind)
        n = np.linalg.norm(G, axis=1)
        V = project_dual_cone(G @ G.T, np.eye(100))
        for i in range(0, 100, 9):
            z, _ = scipy.optimize.nnls((G / n[:, None]).T, -G[i] / n[i], maxiter=10_000)
            expected = G[i] / n[i] + z @ (G / n[:, None])
            assert V[i] @ G / n[i] == pytest.approx(expected, abs=1e-6)

    def test_one_at_a_time_is_the_same(self):
        G = hundred("plain")
        M = correlation(G @ G.T)[0]
        apart = np.concatenate([nonnegative_qp(M, row[None]) for row in M])
        assert nonnegative_qp(M, M) == pytest.approx(apart, abs=1e-8)

    def test_exchanged_problem_has_the_same_points(self):
        """With w = Mz + q for any z: what was unknown and what was slack on B change places."""
        rng = np.random.default_rng(4)
        A = rng.standard_normal((9, 7))
        M, Q, z = A.T @ A + np.eye(7), rng.standard_normal((3, 7)), rng.standard_normal((3, 7))
        w = z @ M + Q
        for B in (rng.random(7) < 0.5, np.zeros(7, dtype=bool), np.ones(7, dtype=bool)):
            T, R = _exchanged(M, Q, B)
            assert np.where(B, w, z) @ T.T + R == pytest.approx(np.where(B, z, w))

    def test_the_modulus_method_finds_most_free_sets(self):
        G = hundred("square")
        M = correlation(G @ G.T)[0]
        Z = nonnegative_qp(M, M)
        for pull in (pull_of(M), 0.3 * pull_of(M)):
            V, settled = settle(M, M, pull, 10)
            assert settled
            assert ((V > 0) != (Z > 0)).any(1).mean() <= 0.2
            z, slack = np.maximum(V, 0.0), np.maximum(-V, 0.0)
            assert np.abs(z @ M + M - slack).max() <= 0.02


KINDS_OF_MANY = ["wide", "square", "thin", "few", "rank one", "duplicates", "opposed pairs", "spread", "two camps"]


@given(
    st.sampled_from([1, 2, 3, 10, 22, 40, 100]),
    st.sampled_from(KINDS_OF_MANY),
    st.floats(-8, 8),
    st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_any_projections_have_their_certificate(tasks, kind, decade, seed):
    """Moreau: d in the cone, d - g in the polar one as a non-negative combination, and both orthogonal; whatever the Gramian."""
    rng = np.random.default_rng(seed)
    few = {"square": tasks, "thin": max(1, round(0.6 * tasks)), "few": max(1, tasks // 4), "rank one": 1}
    G = rng.standard_normal((tasks, few.get(kind, 3 * tasks)))
    half = tasks // 2
    if kind == "duplicates":
        G[tasks - half :] = G[:half]
    if kind == "opposed pairs":
        G[tasks - half :] = -G[:half] * rng.uniform(0.5, 2, (half, 1))
    if kind == "spread":
        G *= 10 ** rng.uniform(-4, 4, (tasks, 1))
    if kind == "two camps":
        G += rng.choice([-1.0, 1.0], (tasks, 1)) * rng.standard_normal(G.shape[1])
    G *= 10**decade
    n, U = np.linalg.norm(G, axis=1), np.eye(tasks)
    V = project_dual_cone(G @ G.T, U)
    D, size = V @ G, (V @ n)[:, None]
    assert (V >= U).all()
    assert (D @ G.T / n >= -1e-6 * size).all()
    assert (np.abs(np.einsum("ij,ij->i", D, (V - U) @ G))[:, None] <= 1e-6 * size**2).all()


class TestDualCone:
    def test_projections(self, many):
        """d lies in the cone, d - g in the polar one, and they are orthogonal: Moreau's decomposition."""
        for G in many:
            n = np.linalg.norm(G, axis=1)
            U = np.vstack([np.eye(len(G)), np.full(len(G), 1 / len(G))])
            V = project_dual_cone(G @ G.T, U)
            D, size = V @ G, np.abs(V * n).sum(1)
            assert ((D @ G.T) / n >= -1e-6 * size[:, None]).all()
            assert (V >= U - 1e-12).all()
            assert (np.abs(np.einsum("ij,ij->i", D, (V - U) @ G)) <= 1e-6 * size**2).all()

    def test_agrees_with_nnls(self):
        for seed in range(100):
            G = vectors(seed)
            V = project_dual_cone(G @ G.T, np.eye(len(G)))
            for i, v in enumerate(V):
                z, _ = scipy.optimize.nnls(G.T, -G[i])
                assert v @ G == pytest.approx((np.eye(len(G))[i] + z) @ G, abs=1e-7 * np.linalg.norm(G[i]))

    def test_without_conflict_nothing_changes(self):
        G = np.abs(vectors(3))
        assert project_dual_cone(G @ G.T, np.eye(len(G))) == pytest.approx(np.eye(len(G)))


class TestConflictAverse:
    @pytest.mark.parametrize("c", [0.1, 0.5, 2.0])
    def test_agrees_with_slsqp(self, c):
        """The dual: minimise <g_w, g_0> + c |g_0| |g_w| over the simplex."""
        for seed in range(50):
            G = vectors(seed)
            K = len(G)
            u = np.full(K, 1 / K)
            g0 = u @ G
            r = c * np.linalg.norm(g0)

            def dual(w, G=G, g0=g0, r=r):
                return w @ G @ g0 + r * np.sqrt(w @ G @ G.T @ w + 1e-18)

            found = scipy.optimize.minimize(
                dual,
                u,
                bounds=[(0, None)] * K,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                method="SLSQP",
                tol=1e-14,
            )
            v = conflict_averse(G @ G.T, u, c)
            x = v @ G
            assert np.linalg.norm(x) <= r * (1 + 1e-6)
            # strong duality: the worst improvement reaches the dual's optimum, which SLSQP approaches from above
            worst = (G @ (g0 + x)).min()
            assert worst == pytest.approx(found.fun, rel=1e-4, abs=1e-5 * np.linalg.norm(g0) * np.linalg.norm(G))
            assert worst <= found.fun + 1e-6 * abs(found.fun) + 1e-9

    def test_fills_the_ball_and_is_optimal(self, many):
        for G in many:
            n = np.linalg.norm(G, axis=1)
            u = np.full(len(G), 1 / len(G))
            v = conflict_averse(G @ G.T, u, 0.5)
            g0, x = u @ G, v @ G
            assert (v >= 0).all()
            assert np.linalg.norm(x) <= 0.5 * np.linalg.norm(g0) * (1 + 1e-6) + 1e-9 * n.max()
            gains = G @ (g0 + x)
            # only the worst-off tasks are pulled for, all to one gain, best seen where vectors are short
            size = (u + v) @ n
            pulled = np.flatnonzero(v * n > 1e-9 * size)
            if len(pulled):
                above = (gains - gains[pulled[n[pulled].argmin()]]) / n
                assert above.min() >= -1e-6 * size
                assert np.abs(above[pulled]).max() <= 1e-6 * size

    @pytest.mark.parametrize("tasks", [10, 40, 100])
    @pytest.mark.parametrize("c", [1e-3, 0.1, 0.5])
    def test_few_dimensions(self, tasks, c):
        """The least improvement reaches the dual's value at the weights found, which no direction in the ball exceeds."""
        for dimensions in (2, tasks // 10 + 2, tasks // 4 + 1, tasks // 2):
            G = np.random.default_rng(tasks + dimensions).standard_normal((tasks, dimensions))
            u = np.full(tasks, 1 / tasks)
            g0 = u @ G
            r = c * np.linalg.norm(g0)
            v = conflict_averse(G @ G.T, u, c)
            x, w = v @ G, v / v.sum() @ G
            assert np.linalg.norm(x) <= r * (1 + 1e-8)
            most = w @ g0 + r * np.linalg.norm(w)
            assert (G @ (g0 + x)).min() == pytest.approx(
                most, abs=1e-7 * np.linalg.norm(G, axis=1).max() * np.linalg.norm(g0)
            )

    @pytest.mark.parametrize("tasks", [2, 3, 10, 40, 100])
    def test_a_tiny_ball_serves_the_worst_off_task_alone(self, tasks):
        for dimensions in (1, 2, tasks // 4 + 1, tasks, 5 * tasks):
            G = np.random.default_rng(tasks + dimensions).standard_normal((tasks, dimensions))
            u = np.full(tasks, 1 / tasks)
            g0 = u @ G
            worst = G[(G @ g0).argmin()]
            x = conflict_averse(G @ G.T, u, 1e-6) @ G
            assert x / np.linalg.norm(g0) * 1e6 == pytest.approx(worst / np.linalg.norm(worst), abs=3e-6)

    def test_no_radius(self):
        G = vectors(1)
        assert conflict_averse(G @ G.T, np.full(len(G), 1 / len(G)), 0.0) == pytest.approx(np.zeros(len(G)))


class TestFairWeights:
    @pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 10.0])
    def test_solves_its_equation(self, alpha):
        for seed in range(60):
            # an alpha of 10 raises ratios of lengths to the tenth power
            for decades in (0.0, 12.0 if alpha <= 2 else 1.0):
                G = vectors(seed, decades=decades, common=0.6)
                C = G @ G.T
                p = np.random.default_rng(seed).uniform(0.2, 3, len(G))
                w = fair_weights(C, p, alpha)
                assert (w > 0).all()
                wanted = p * w ** (-1 / alpha)
                # relative to what is added up on the left, the accuracy that C itself allows
                n = np.linalg.norm(G, axis=1)
                assert (np.abs(C @ w - wanted) <= 1e-9 * wanted + 1e-12 * n * (n @ w)).all()

    def test_agrees_with_least_squares(self):
        for seed in range(40):
            G = vectors(seed, common=1.0)
            C, n = G @ G.T, np.linalg.norm(G, axis=1)
            w = fair_weights(C, np.ones(len(G)), 2.0)
            start = np.full(len(G), 1 / len(G))
            found = scipy.optimize.least_squares(
                lambda w, C=C: C @ w - w**-0.5, start, bounds=(1e-12, np.inf), xtol=1e-15, ftol=1e-15, gtol=1e-15
            )
            assert w @ G == pytest.approx(found.x @ G, rel=1e-4, abs=1e-4 * float(w @ n))

    def test_rank_deficient_but_not_stationary(self):
        for seed in range(60):
            G = vectors(seed, low_rank=True)
            G[:, 0] = 0.5 + np.abs(G[:, 0])  # all have a part in common: 0 is not in their hull
            C = G @ G.T
            w = fair_weights(C, np.ones(len(G)), 1.0)
            assert C @ w == pytest.approx(1 / w, rel=1e-8)

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
    def test_stationary_points_fall_back_and_say_so(self, alpha, caplog):
        G = np.array([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
        with caplog.at_level(logging.INFO, logger="polytask"):
            w = fair_weights(G @ G.T, np.ones(3), alpha)
        assert w @ G == pytest.approx(np.zeros(2), abs=1e-6)
        assert w.sum() == pytest.approx(1)
        assert "Pareto stationary" in caplog.text

    @pytest.mark.parametrize("K", [40, 100])
    def test_many_tasks(self, K):
        rng = np.random.default_rng(K)
        G = rng.standard_normal((K, 2 * K)) + 0.1
        C = G @ G.T
        for alpha in (1.0, 2.0):
            w = fair_weights(C, np.ones(K), alpha)
            assert C @ w == pytest.approx(w ** (-1 / alpha), rel=1e-9)


def test_correlation_of_many_decades():
    G = vectors(5)
    scales = 10.0 ** np.linspace(-6, 6, len(G))
    R, n = correlation((G * scales[:, None]) @ (G * scales[:, None]).T)
    assert pytest.approx(correlation(G @ G.T)[0], abs=1e-12) == R
    assert n == pytest.approx(np.linalg.norm(G, axis=1) * scales)


class TestPrecision:
    """Gradients multiplied in single precision make Gramians with eigenvalues of -1e-8 where there should be none."""

    def test_rounding_of_a_lower_precision_is_outweighed(self):
        for seed in range(40):
            G = vectors(seed, low_rank=True)
            exact, rounded = G @ G.T, (G.astype(np.float32) @ G.astype(np.float32).T).astype(np.float64)
            size = np.linalg.norm(G, axis=1).max()
            u = np.eye(len(G)) / len(G)
            v = project_dual_cone(rounded, u, SINGLE).sum(0)
            assert np.abs(v).max() <= 1e4
            assert np.linalg.norm((v - project_dual_cone(exact, u).sum(0)) @ G) <= 2e-3 * size
            w = min_norm_point(rounded, SINGLE)
            assert np.linalg.norm((w - min_norm_point(exact)) @ G) <= 2e-3 * size

    def test_full_rank_is_hardly_touched(self):
        for seed in range(40):
            G = vectors(seed, common=1.0)
            C = G @ G.T
            for solve in (min_norm_point, lambda C, p: fair_weights(C, np.ones(len(C)), 1.0, p)):
                w, e = solve(C, SINGLE), solve(C, DOUBLE)
                assert w @ G == pytest.approx(e @ G, rel=1e-3, abs=1e-4 * float(np.abs(e) @ np.linalg.norm(G, axis=1)))


class TestOpposed:
    """Gordan: either some d has positive products with all vectors, or a non-negative combination of them is 0."""

    @pytest.mark.parametrize("decades", [0.0, 12.0])
    @pytest.mark.parametrize("precision", [DOUBLE, SINGLE])
    def test_weights_prove_that_no_direction_is_left(self, decades, precision):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            K = int(rng.integers(12, 100))
            G = rng.standard_normal((K, K // 4)) * 10 ** rng.uniform(-decades / 2, decades / 2, (K, 1))
            w = opposed(G @ G.T, precision)
            assert w is not None
            assert w.min() >= 0
            assert w.sum() == pytest.approx(1)
            n = np.linalg.norm(G, axis=1)
            assert np.linalg.norm(w @ G) <= 1e-5 * (w @ n)
            assert np.linalg.matrix_rank(G[w > 0] / n[w > 0, None]) == K // 4

    def test_none_where_a_direction_is_left(self):
        for seed in range(40):
            rng = np.random.default_rng(seed)
            G = rng.standard_normal((30, 10))
            assert opposed(np.abs(G) @ np.abs(G).T) is None
            H = rng.standard_normal((9, 9))
            assert opposed(H @ H.T) is None
            # 0 lies in the hull, but what the last one asks for opposes nobody
            apart = scipy.linalg.block_diag(G, [[1.0]])
            assert opposed(apart @ apart.T) is None


class TestThinCones:
    """Twice as many gradients as dimensions nearly oppose one another: free sets are found late, and as exactly."""

    @pytest.mark.parametrize(("K", "dimensions"), [(40, 21), (60, 32), (100, 53), (100, 60), (100, 75)])
    def test_agrees_with_nnls(self, K, dimensions):
        for seed in range(2):
            G = np.random.default_rng(seed).standard_normal((K, dimensions))
            n = np.linalg.norm(G, axis=1)
            V = project_dual_cone(G @ G.T, np.eye(K))
            for i in range(0, K, 9):
                z, _ = scipy.optimize.nnls((G / n[:, None]).T, -G[i] / n[i], maxiter=10_000)
                expected = G[i] / n[i] + z @ (G / n[:, None])
                assert V[i] @ G / n[i] == pytest.approx(expected, abs=1e-6)

    def test_one_row_is_followed_to_its_end_from_any_guess(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            G = rng.standard_normal((50, 27))
            M = definite(correlation(G @ G.T)[0])
            q, guess = rng.standard_normal(50), rng.random(50) < 0.3
            z = _follow(M, q, guess)
            slack, size = M @ z + q, np.abs(q).max() + z.max()
            assert z.min() >= -1e-9 * size
            assert slack.min() >= -1e-9 * size
            assert np.abs(z * slack).max() <= 1e-8 * size**2

"""TurboTrain's balancer: when it suppresses, and what a suppressed step is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.balancing import make
from polytask.errors import InputError

from .conftest import gradients


def suppressed(**options):
    return make("turbotrain", period=1, share=1, **options)


def test_free_and_suppressed_steps_follow_the_period():
    J = gradients(0, 3, 8)
    balancer = make("turbotrain", period=5, share=2)
    free = [bool(torch.equal(balancer.direction(J), J.sum(0))) for _ in range(12)]
    assert free == [True, True, True, False, False] * 2 + [True, True]
    assert [
        bool(torch.equal(b, J.sum(0))) for m in [make("turbotrain")] for b in [m.direction(J) for _ in range(4)]
    ] == [
        True,
        False,
        True,
        False,
    ]


def test_without_suppressed_steps_it_is_joint_training_bit_for_bit():
    plain, balancer = make("equal"), make("turbotrain", share=0)
    for seed in range(6):
        J, values = gradients(seed, 4, 30), torch.ones(4, dtype=torch.float64)
        assert torch.equal(balancer.direction(J, values), plain.direction(J, values))


def test_orthogonal_gradients_of_one_length_are_added():
    J = 3 * torch.linalg.qr(gradients(1, 7, 7))[0][:4]
    torch.testing.assert_close(suppressed().direction(J), J.sum(0), rtol=1e-9, atol=1e-9)


def test_parallel_gradients_stay_finite():
    J = torch.outer(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), gradients(2, 1, 9)[0])
    d = suppressed().direction(J)
    assert bool(torch.isfinite(d).all())
    assert float(torch.cosine_similarity(d, J[0], dim=0)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_transformed_gradients_are_orthogonal_and_the_identities_hold(seed):
    K = 2 + seed
    J = gradients(seed, K, K + 6)
    C = (J @ J.T).numpy()
    # B from the weights B p of K independent preferences
    P = np.random.default_rng(seed).uniform(0.5, 2, (K, K))
    P *= K / P.sum(1, keepdims=True)
    weights = np.stack([suppressed(preference=list(p)).weights(torch.tensor(C)).numpy() for p in P])
    B = np.linalg.solve(P, weights)
    G = B @ J.numpy()
    norms = np.linalg.norm(G, axis=1)
    cosines = (G @ G.T) / np.outer(norms, norms)
    np.testing.assert_allclose(cosines, np.eye(K), atol=1e-5)
    sigma = np.sqrt(np.linalg.eigvalsh(C))
    np.testing.assert_allclose(norms, sigma[0], rtol=1e-5)
    p = np.ones(K)
    d = suppressed().direction(J).numpy()
    np.testing.assert_allclose(G @ d, sigma[0] ** 2 * p, rtol=1e-5)
    lam, V = np.linalg.eigh(C)
    root = (V * np.sqrt(lam)) @ V.T
    np.testing.assert_allclose(J.numpy() @ d, sigma[0] * root @ p, rtol=1e-5, atol=1e-7 * np.linalg.norm(C))
    assert np.linalg.norm(d) <= sigma[0] * np.sqrt(K) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_projection_opposes_neither_of_two_tasks(seed):
    J = gradients(seed, 2, 3, decades=3)
    assert float((J @ suppressed(suppress="pcgrad").direction(J) / J.norm(dim=1)).min()) >= -1e-9 * float(J.norm())


def test_aligning_only_in_conflict_leaves_agreeing_gradients_alone():
    agreeing = torch.tensor([[1.0, 0.2], [0.5, 1.0]], dtype=torch.float64)
    opposed = torch.tensor([[1.0, 0.2], [-0.5, 1.0]], dtype=torch.float64)
    balancer = suppressed(suppress="align_if_conflict")
    assert torch.equal(balancer.direction(agreeing), agreeing.sum(0))
    torch.testing.assert_close(balancer.direction(opposed), make("aligned_mtl").direction(opposed))
    assert not torch.allclose(balancer.direction(opposed), opposed.sum(0))


def test_random_projections_go_on_where_they_stopped():
    steps = [gradients(s, 4, 6) for s in range(8)]
    straight, first, second = (make("turbotrain", suppress="pcgrad", seed=s) for s in (0, 0, 9))
    expected = [straight.direction(J) for J in steps]
    done = [first.direction(J) for J in steps[:3]]
    second.load_state_dict(first.state_dict())
    found = [*done, *(second.direction(J) for J in steps[3:])]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"suppress": "none"}, "'aligned', 'pcgrad'"), ({"period": 0}, "0 to 0 of 0"), ({"share": 3}, "0 to 2 of 2")],
)
def test_refuses_options_by_name(options, said):
    with pytest.raises(InputError, match=said):
        make("turbotrain", **options)

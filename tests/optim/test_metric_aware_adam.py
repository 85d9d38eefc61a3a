"""MAdam against its definition: what M is, what it does to a step, and that it behaves like an optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polytask.balancing import make
from polytask.errors import InputError, TrainingError
from polytask.models import HardSharing
from polytask.optim import MAdam, MetricAwareAdam
from polytask.optim.pair_moments import PairMoments

P = 6


def parameter(n=P):
    return nn.Parameter(torch.zeros(n, dtype=torch.float64))


def linear_losses(theta, rows):
    """Losses whose gradients are the given rows wherever theta is."""
    return [theta @ g for g in rows]


def gradients(steps, tasks=2, n=P, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.arange(tasks, dtype=torch.float64)[:, None]
    return sizes * torch.randn(steps, tasks, n, generator=g, dtype=torch.float64)


def run(theta, optimizer, rows, weights, **options):
    trajectory = []
    for t, g in enumerate(rows):
        optimizer.zero_grad()
        w = weights[t] if isinstance(weights[0], list) else weights
        optimizer.backward(linear_losses(theta, g), shared=[theta], weights=w, **options)
        optimizer.step()
        trajectory.append(theta.detach().clone())
    return torch.stack(trajectory)


def test_with_fixed_weights_it_is_rmsprop_with_bias_correction():
    rows, lam, lr, b2, eps = gradients(50), torch.tensor([0.3, 0.7], dtype=torch.float64), 0.01, 0.9, 1e-8
    theta = parameter()
    found = run(theta, MAdam(torch.optim.SGD([theta], lr=lr), beta2=b2, ramp=0, eps=eps), rows, lam.tolist())
    v, x = torch.zeros(P, dtype=torch.float64), torch.zeros(P, dtype=torch.float64)
    for t, g in enumerate(rows, start=1):
        d = lam @ g
        v = b2 * v + (1 - b2) * d**2
        x = x - lr * d / ((v / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(found[t - 1], x, rtol=1e-9, atol=1e-12)


def test_multiplying_all_weights_changes_nothing():
    rows = gradients(30)
    found = []
    for c in (1.0, 1e-4, 1e4):
        theta = parameter()
        found.append(run(theta, MAdam(torch.optim.SGD([theta], lr=0.1), eps=0.0), rows, [0.2 * c, 0.8 * c]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_second_moment_is_the_mean_square_of_the_weighted_gradient(seed, tasks, signed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, tasks, P, generator=g, dtype=torch.float64)
    lam = torch.randn(tasks, generator=g, dtype=torch.float64)
    lam = lam if signed else lam.abs()
    b2 = 0.8
    full, diag = (PairMoments(tasks, rows[0, 0], b2, cross) for cross in ("full", "diag"))
    for step in rows:
        full.update(dict(enumerate(step)))
        diag.update(dict(enumerate(step)))
    age = torch.tensor([b2**k for k in reversed(range(12))], dtype=torch.float64) * (1 - b2) / (1 - b2**12)
    C = full.second_moment(lam)
    torch.testing.assert_close(C, torch.einsum("t,tp->p", age, (lam @ rows) ** 2), rtol=1e-8, atol=1e-12)
    assert (C >= 0).all()
    torch.testing.assert_close(diag.second_moment(lam), torch.einsum("t,k,tkp->p", age, lam**2, rows**2))
    assert diag.F.shape == (tasks, P)
    assert full.F.shape == (tasks * (tasks + 1) // 2, P)


def test_after_a_switch_of_preference_the_step_has_full_length_at_once():
    g = torch.Generator().manual_seed(0)
    signs = torch.randn(2001, 2, P, generator=g, dtype=torch.float64).sign()
    rows = signs * torch.tensor([100.0, 1.0], dtype=torch.float64)[:, None]
    weights = [[1.0, 0.0]] * 2000 + [[0.0, 1.0]]
    lr = 0.1
    theta = parameter()
    inner = torch.optim.SGD([theta], lr=lr)
    path = run(theta, MAdam(inner, ramp=0), rows, weights)
    torch.testing.assert_close(
        (path[-1] - path[-2]).abs(), torch.full((P,), lr, dtype=torch.float64), rtol=1e-3, atol=0
    )
    # Adam without momentum divides by the history of the other preference
    eta = parameter()
    adam = torch.optim.Adam([eta], lr=lr, betas=(0.0, 0.999))
    for t, step in enumerate(rows):
        before = eta.detach().clone()
        eta.grad = torch.tensor(weights[t], dtype=torch.float64) @ step
        adam.step()
    moved = (eta.detach() - before).abs() / lr
    assert float(moved.max()) < 0.02


def test_adams_metric_may_turn_agreement_into_conflict():
    g1, g2 = torch.tensor([10.0, 1.0]), torch.tensor([10.0, -1.0])
    metric = torch.tensor([1 / 1000, 1.0])
    assert float(g1 @ g2) == 99
    torch.testing.assert_close(g1 @ (metric * g2), torch.tensor(-0.9))


@pytest.mark.parametrize("cross", ["full", "diag", "sampled"])
def test_a_single_objective_does_not_see_the_scale_of_its_loss(cross):
    rows = gradients(40, tasks=1)
    found = []
    for c in (1.0, 1e6):
        theta = parameter()
        optimizer = MAdam(torch.optim.Adam([theta], lr=0.01), ramp=0, eps=0.0, cross=cross)
        found.append(run(theta, optimizer, c * rows, [1.0]))
    torch.testing.assert_close(found[0], found[1])


def test_an_endless_ramp_is_the_inner_optimizer():
    rows, lam = gradients(60), torch.tensor([0.5, 0.5], dtype=torch.float64)
    theta, eta = parameter(), parameter()
    found = run(theta, MAdam(torch.optim.Adam([theta], lr=0.01), ramp=10**12, base="unit"), rows, lam.tolist())
    adam = torch.optim.Adam([eta], lr=0.01)
    for t, g in enumerate(rows):
        eta.grad = lam @ g
        adam.step()
        torch.testing.assert_close(found[t], eta.detach(), rtol=1e-9, atol=1e-12)
    # with gradients of one size M is constant: its mean divides every step alike, which Adam does not notice
    one_size = 7.0 * gradients(60, tasks=1).sign()
    theta, eta = parameter(), parameter()
    found = run(theta, MAdam(torch.optim.Adam([theta], lr=0.01), ramp=10**12, base="mean"), one_size, [1.0])
    adam = torch.optim.Adam([eta], lr=0.01)
    for t, g in enumerate(one_size):
        eta.grad = g[0]
        adam.step()
        torch.testing.assert_close(found[t], eta.detach(), rtol=1e-6, atol=1e-12)


def test_the_ramp_goes_from_the_base_to_the_whitened_gradient():
    rows = gradients(4)
    for base in ("mean", "unit"):
        theta = parameter()
        optimizer = MAdam(torch.optim.SGD([theta], lr=1.0), ramp=4, base=base, eps=0.0, beta2=0.0)
        for t, g in enumerate(rows, start=1):
            optimizer.zero_grad()
            optimizer.backward(linear_losses(theta, g), shared=[theta])
            optimizer.step()
            d = g.sum(0)
            start = d.abs().mean() if base == "mean" else 1.0
            torch.testing.assert_close(theta.grad, d / ((1 - t / 4) * start + t / 4 * d.abs()))


def network(seed=0):
    torch.manual_seed(seed)
    return HardSharing(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), {n: nn.Linear(8, 1) for n in "abc"}).double()


def batch_losses(model, step, names="abc", scales=(1.0, 10.0, 0.1)):
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 4, generator=g, dtype=torch.float64)
    y = torch.randn(16, 3, generator=g, dtype=torch.float64)
    out = model(x)
    return {n: scales[i] * ((out[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate("abc") if n in names}


def train(model, optimizer, steps, first=0, scheduler=None, **options):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        optimizer.backward(batch_losses(model, step), shared=model.shared_parameters(), **options)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("cross", ["full", "diag", "sampled"])
@pytest.mark.parametrize("balancer", [None, "mgda", "rlw", "graddrop"])
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(cross, balancer):
    def made(seed):
        model = network(seed)
        optimizer = MAdam(torch.optim.AdamW(model.parameters(), lr=0.01), cross=cross, ramp=8, seed=3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return model, optimizer, scheduler, None if balancer is None else make(balancer, seed=5)

    model, optimizer, scheduler, method = made(0)
    train(model, optimizer, 12, scheduler=scheduler, balancer=method)
    whole = copy.deepcopy(model.state_dict())

    model, optimizer, scheduler, method = made(0)
    train(model, optimizer, 5, scheduler=scheduler, balancer=method)
    parts = (model, optimizer, scheduler) if method is None else (model, optimizer, scheduler, method)
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    model, optimizer, scheduler, method = made(1)
    parts = (model, optimizer, scheduler) if method is None else (model, optimizer, scheduler, method)
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, 7, first=5, scheduler=scheduler, balancer=method)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_scheduler_moves_the_learning_rate_of_both():
    model = network()
    optimizer = MAdam(torch.optim.AdamW(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 2, scheduler=scheduler)
    assert optimizer.inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.025
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("cross", ["full", "sampled"])
@pytest.mark.parametrize("how", ["weights", "equal", "mgda"])
def test_raw_gradients_are_those_of_polytask_backward(cross, how):
    import polytask

    weights = {"a": 0.5, "b": 2.0, "c": 0.0}
    model, other = network(), network()
    optimizer = MAdam(torch.optim.Adam(model.parameters()), cross=cross)
    for step in range(3):  # the first step of the sampled mode looks at all tasks, the others at a pair
        optimizer.zero_grad()
        other.zero_grad()
        options = {"weights": weights} if how == "weights" else {"balancer": make(how)}
        optimizer.backward(batch_losses(model, step), shared=model.trunk, **options)
        if how == "weights":
            sum(weights[n] * loss for n, loss in batch_losses(other, step).items()).backward()
        else:
            polytask.backward(batch_losses(other, step), shared=other.trunk, balancer=make(how), level="exact")
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        optimizer.moments.update(optimizer._rows)


def test_weights_of_an_aggregator_reproduce_its_direction():
    model = network()
    optimizer = MAdam(torch.optim.Adam(model.parameters()))
    w = optimizer.backward(batch_losses(model, 0), shared=model.trunk, balancer=make("pcgrad"))
    flat = torch.cat([p.grad.flatten() for p in optimizer.shared])
    rows = torch.stack([optimizer._rows[k] for k in range(3)])
    torch.testing.assert_close(w.to(rows) @ rows, flat)


def test_a_batch_in_pieces_is_the_whole_batch():
    found = []
    for pieces in (1, 2):
        theta = parameter()
        optimizer = MAdam(torch.optim.Adam([theta], lr=0.1))
        for g in gradients(10):
            optimizer.zero_grad()
            for _ in range(pieces):
                optimizer.backward(linear_losses(theta, g / pieces), shared=[theta], weights=[0.3, 0.7])
            optimizer.step()
        found.append(theta.detach().clone())
    torch.testing.assert_close(found[0], found[1])


def test_clipping_between_backward_and_step_bounds_the_raw_gradient():
    rows = gradients(1)
    theta = parameter()
    optimizer = MAdam(torch.optim.SGD([theta], lr=1.0), ramp=0)
    optimizer.backward(linear_losses(theta, rows[0]), shared=[theta])
    norm = torch.nn.utils.clip_grad_norm_([theta], 1.0)
    torch.testing.assert_close(norm, rows[0].sum(0).norm())
    optimizer.step()
    torch.testing.assert_close(theta.grad, (rows[0].sum(0) / rows[0].sum(0).abs()) / norm, rtol=1e-5, atol=0)


def test_absent_tasks_keep_their_moments():
    model = network()
    optimizer = MAdam(torch.optim.Adam(model.parameters(), lr=0.01))
    optimizer.bind("abc")
    train(model, optimizer, 2)
    kept = dict(zip(optimizer.moments.pairs, optimizer.moments.counts, strict=True))
    optimizer.zero_grad()
    w = optimizer.backward(batch_losses(model, 2, "ca"), shared=model.trunk)
    optimizer.step()
    assert w.shape == (2,)
    for pair, n in zip(optimizer.moments.pairs, optimizer.moments.counts, strict=True):
        assert n == kept[pair] + (1 not in pair)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_sampling_takes_three_passes_and_agrees_in_the_long_run():
    model = HardSharing(nn.Linear(4, 8), {n: nn.Linear(8, 1) for n in "abcde"}).double()
    optimizer = MAdam(torch.optim.Adam(model.parameters(), lr=0.0), cross="sampled", beta2=0.98)
    optimizer.bind("abcde")
    full = MAdam(torch.optim.Adam(model.parameters(), lr=0.0), beta2=0.98)
    g = torch.Generator().manual_seed(0)
    looked = []
    for _ in range(150):
        x = torch.randn(8, 4, generator=g, dtype=torch.float64)
        for one in (optimizer, full):
            one.zero_grad()
            losses = {n: (out[:, 0] ** 2).mean() for n, out in model(x).items()}
            one.backward(losses, shared=model.trunk)
            if one is optimizer:
                looked.append(len(one._rows))
            one.step()
    assert looked[0] == 5
    assert set(looked[1:]) == {1, 2}
    lam = torch.ones(5, dtype=torch.float64)
    ratio = optimizer.moments.second_moment(lam) / full.moments.second_moment(lam)
    assert float(ratio.log().abs().median()) < 0.5


def test_copies_go_on_by_themselves():
    model = network()
    optimizer = MAdam(torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, optimizer, 2)
    model.features.clear()  # the last forward pass is no part of the model
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, first=2)
    train(twin_model, twin, 3, first=2)
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p is not q


def test_gradient_scaler_changes_nothing_and_an_overflow_skips_the_step():
    model, other = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    optimizer = MAdam(torch.optim.AdamW(model.parameters(), lr=0.01))
    plain = MAdam(torch.optim.AdamW(other.parameters(), lr=0.01))
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(batch_losses(model, step), shared=model.trunk, balancer=make("mgda"), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    train(other, plain, 3, balancer=make("mgda"))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    before = copy.deepcopy((model.state_dict(), optimizer.moments.F))
    optimizer.zero_grad()
    losses = batch_losses(model, 3)
    losses["b"] = losses["b"] * float("inf")
    optimizer.backward(losses, shared=model.trunk, balancer=make("mgda"), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(v, before[0][n]) for n, v in model.state_dict().items())
    assert torch.equal(optimizer.moments.F, before[1])
    assert optimizer.steps == 3


class TestRefusals:
    def test_step_without_task_gradients(self):
        theta = parameter()
        optimizer = MAdam(torch.optim.Adam([theta]))
        theta.sum().backward()
        with pytest.raises(InputError, match="in place of"):
            optimizer.step()

    def test_a_loss_that_is_not_finite_is_named_and_nothing_is_touched(self):
        model = network()
        optimizer = MAdam(torch.optim.Adam(model.parameters()))
        losses = batch_losses(model, 0)
        losses["b"] = losses["b"] * float("nan")
        with pytest.raises(TrainingError, match="loss of task 'b'"):
            optimizer.backward(losses, shared=model.trunk)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 0.0], [1.0, float("nan"), 0.0], 5, "xyz"])
    def test_weights_that_do_not_fit(self, weights):
        model = network()
        with pytest.raises(InputError, match="3 weights of at least 0"):
            MAdam(torch.optim.Adam(model.parameters())).backward(batch_losses(model, 0), weights=weights)

    def test_a_task_without_weight_and_a_task_not_known(self):
        model = network()
        optimizer = MAdam(torch.optim.Adam(model.parameters()))
        with pytest.raises(InputError, match="no weight is given for the task 'c'"):
            optimizer.backward(batch_losses(model, 0), weights={"a": 1.0, "b": 1.0})
        other = MAdam(torch.optim.Adam(model.parameters()))
        other.bind("ab")
        with pytest.raises(InputError, match="c is not one of them"):
            other.backward(batch_losses(model, 0))

    def test_shared_parameters_of_another_model(self):
        model = network()
        optimizer = MAdam(torch.optim.Adam(model.heads.parameters()))
        with pytest.raises(InputError, match="wrapped optimizer"):
            optimizer.backward(batch_losses(model, 0), shared=model.trunk)

    def test_both_a_balancer_and_weights(self):
        model = network()
        with pytest.raises(InputError, match="not both"):
            MAdam(torch.optim.Adam(model.parameters())).backward(
                batch_losses(model, 0), balancer="mgda", weights=[1, 1, 1]
            )

    @pytest.mark.parametrize(
        ("option", "value"), [("cross", "half"), ("base", "max"), ("ramp", -1), ("beta2", 1.0), ("eps", -1.0)]
    )
    def test_options_by_name(self, option, value):
        with pytest.raises(InputError, match=option):
            MetricAwareAdam(torch.optim.Adam([parameter()]), **{option: value})

    def test_states_of_others(self):
        model = network()
        optimizer = MAdam(torch.optim.Adam(model.parameters()))
        with pytest.raises(InputError, match="not saved by madam"):
            optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
        train(model, optimizer, 1)
        with pytest.raises(InputError, match="moments of shape"):
            MAdam(torch.optim.Adam(model.parameters()), cross="diag").load_state_dict(optimizer.state_dict())

"""Methods that look at several batches or beside the parameters: their formulas against references, and the mechanism that runs them."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.func import grad, jacrev

import polytask
from polytask.balancing import make
from polytask.balancing.forum import constrained_weights
from polytask.balancing.looks import Evaluations, Looks, looks_again
from polytask.errors import InputError, TrainingError
from polytask.models import HardSharing

from .conftest import METHODS, build

NAMES = ("a", "b", "c")
LOOKING = [m.name for m in METHODS.values() if looks_again(build(m))]


def net(dropout: float = 0.0, norm: bool = False) -> HardSharing:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(6)] if norm else []
    trunk = nn.Sequential(nn.Linear(4, 6), *between, nn.Tanh(), nn.Dropout(dropout))
    return HardSharing(trunk, {n: nn.Linear(6, 1) for n in NAMES}).double()


def batch(seed: int, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0], x[:, 1] * 2 - 1, x[:, 2] * x[:, 3]], 1)


def losses_of(model: nn.Module, rows: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = model(rows[0])
    return {n: ((found[n][:, 0] - rows[1][:, i]) ** 2).mean() for i, n in enumerate(NAMES)}


def looks_at(method, model, batches) -> Looks:
    method.bind(NAMES)
    evaluations = Evaluations(lambda rows: losses_of(model, rows), batches, method.roles)
    return Looks(method, evaluations, model.shared_parameters())


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def backward(model, method, batches, **options):
    model.zero_grad()
    options = {"shared": model.shared_parameters(), **options}
    return polytask.backward_batches(lambda rows: losses_of(model, rows), batches, balancer=method, **options)


def functional(model):
    """The parameters in one vector, shared ones first, the losses of a batch as a function of it, and the number that is shared."""
    sizes = [p.shape for p in model.parameters()]
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def losses(flat, rows):
        pieces = torch.split(flat, [size.numel() for size in sizes])
        weight, bias, *heads = (p.view(size) for p, size in zip(pieces, sizes, strict=True))
        z = torch.tanh(nn.functional.linear(rows[0], weight, bias))
        found = [nn.functional.linear(z, heads[2 * i], heads[2 * i + 1])[:, 0] for i in range(3)]
        return torch.stack([((y - rows[1][:, i]) ** 2).mean() for i, y in enumerate(found)])

    return theta, losses, sizes[0].numel() + sizes[1].numel()


def relative(found, expected) -> float:
    return float((torch.as_tensor(found) - torch.as_tensor(expected)).norm() / torch.as_tensor(expected).norm())


# ---- the methods ----


def test_modo_follows_torchjds_weights() -> None:
    """The weights that TorchJD 0.18's MoDoWeighting(gamma=0.1, rho=0.1) returned on three matrices in a row."""
    matrices = [
        [[2.0, -1.0, 0.5], [-0.8, 1.5, 0.2], [0.4, 0.3, 1.0]],
        [[1.0, -2.5, 0.1], [-2.0, 0.5, 0.6], [0.3, 0.5, -0.2]],
        [[30.0, -1.0, 0.5], [-0.8, 15.0, 0.2], [0.4, 0.3, 10.0]],
    ]
    expected = [
        [0.3288888889, 0.3488888889, 0.3222222222],
        [0.3602962963, 0.3579851852, 0.2817185185],
        [0.0, 0.4342927407, 0.5657072593],
    ]
    method = make("modo", gamma=0.1, rho=0.1, unit=1.0)
    method.bind(NAMES)
    for M, w in zip(matrices, expected, strict=True):
        np.testing.assert_allclose(method.weights_of(np.array(M), None, squares=np.ones(3)), w, rtol=1e-8)


def test_modo_multiplies_the_gradients_of_two_batches_and_follows_a_third() -> None:
    generator = torch.Generator().manual_seed(0)
    G1, G2, G3 = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    x = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    method = make("modo", gamma=1e-3, rho=0.0, unit=1.0)
    polytask.backward_batches(
        lambda G: dict(zip(NAMES, (1 + G @ x + 0.5 * (x @ x)).unbind(), strict=True)),
        [G1, G2, G3],
        shared=[x],
        balancer=method,
    )
    step = -1e-3 * (G1 @ (G2.T @ torch.full((3,), 1 / 3, dtype=torch.float64)))
    w = 1 / 3 + step - step.mean()  # the simplex keeps the sum
    torch.testing.assert_close(torch.as_tensor(method.state["weights"]), w, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, w @ G3, rtol=1e-12, atol=0)


def test_modos_step_is_unbiased_where_that_of_one_batch_is_not() -> None:
    rng = np.random.default_rng(0)
    mean, noise, n = 0.3 * rng.standard_normal((3, 6)), 0.7 * np.array([[1.0], [2.0], [3.0]]), 1500
    method = make("modo", gamma=1e-3, rho=0.0, unit=1.0)
    moves: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for independent, found in moves.items():
        for _ in range(n):
            first, second = (mean + noise * rng.standard_normal((3, 6)) for _ in range(2))
            method.bind(NAMES)
            method.state = method.initial_state(3)
            w = method.weights_of(first @ (second if independent else first).T, None, squares=np.ones(3))
            found.append((w - 1 / 3) / 1e-3)
    expected = -(mean @ mean.T).mean(1)
    expected -= expected.mean()
    z = {k: (np.mean(v, 0) - expected) / (np.std(v, 0) / np.sqrt(n)) for k, v in moves.items()}
    assert np.abs(z[True]).max() < 4
    assert np.abs(z[False]).max() > 12


def test_gs_mgda_is_mgda_with_weights_kept_warm() -> None:
    J = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    method = make("gs_mgda")
    errors = [relative(method.direction(J), make("mgda").direction(J)) for _ in range(200)]
    assert errors[0] > 0.05
    assert errors[-1] < 1e-6
    assert len(method.roles) == 1


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
def test_sdmgrad_of_three_batches_tends_to_the_exact_one(noise: float) -> None:
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    stochastic, exact = make("sdmgrad", batches=3), make("sdmgrad")

    def losses(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(NAMES, (1 + rows @ x).unbind(), strict=True))

    for _ in range(20):
        x.grad = None
        batches = [G + noise * torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
        polytask.backward_batches(losses, batches, shared=[x], balancer=stochastic)
    assert relative(x.grad, exact.direction(G)) < 5 * noise


def test_auto_lambdas_finite_difference_is_the_exact_hypergradient() -> None:
    model, train, validation = net(), batch(1), batch(2)
    method = make("auto_lambda", inner_lr=0.05, preference={"a": 1.0, "b": 2.0, "c": 0.5})
    w = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    found = method.hypergradient(looks_at(method, model, [train, validation]), w)
    theta, losses, _ = functional(model)
    p = torch.as_tensor(method.p)

    def after(weights):
        step = grad(lambda t: weights @ losses(t, train))(theta)
        return p @ losses(theta - 0.05 * step, validation)

    assert relative(found, grad(after)(w)) < 1e-4


def test_auto_lambda_steps_on_the_training_batch_with_its_new_weights() -> None:
    model, train, validation = net(), batch(1), batch(2)
    method = make("auto_lambda", lr=0.02)
    before = [p.clone() for p in model.parameters()]
    seen = backward(model, method, [train, validation])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    lam = method.state["weights"].double()
    assert set((lam - 0.1).abs().round(decimals=4).tolist()) == {0.02}  # Adam's first step
    torch.testing.assert_close(seen.weights, lam)
    found = gradient(model)
    model.zero_grad()
    sum(w * loss for w, loss in zip(lam, losses_of(model, train).values(), strict=True)).backward()
    torch.testing.assert_close(found, gradient(model))


def test_moml_is_what_torch_func_finds() -> None:
    model, train, validation = net(), batch(1), batch(2)
    method = make("moml", inner_lr=0.2, lr=0.05, preference=[1.0, 2.0, 0.5])
    theta, losses, _ = functional(model)
    log_p = (torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) / 3.5 * 3).log()

    def after(alpha):
        step = grad(lambda t: torch.softmax(alpha + log_p, 0) @ losses(t, train))(theta)
        return losses(theta - 0.2 * step, validation)

    A = jacrev(after)(torch.zeros(3, dtype=torch.float64))
    looks = looks_at(method, model, [train, validation])
    assert relative(method.slopes(looks, looks.rows(0), torch.softmax(log_p, 0)), A) < 1e-9
    unit = A / A.norm(dim=1, keepdim=True)
    best = min(
        (np.linalg.norm(np.array(w) @ unit.numpy()), w)
        for w in ([u, v, 1 - u - v] for u in np.linspace(0, 1, 201) for v in np.linspace(0, 1 - u, 201))
    )[1]
    h = torch.tensor(best, dtype=torch.float64) @ unit
    seen = backward(model, method, [train, validation])
    moved = method.state["alpha"].double()
    large = h.abs() > 0.02 * h.abs().max()
    torch.testing.assert_close(moved[large], -0.05 * h[large].sign(), rtol=1e-5, atol=0)  # Adam's first step
    torch.testing.assert_close(seen.weights, torch.softmax(moved + log_p, 0), rtol=1e-6, atol=0)
    expected = grad(lambda t: seen.weights @ losses(t, train))(theta)
    assert relative(gradient(model), expected) < 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_forums_weights_solve_its_quadratic_program(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = 2 + seed % 4
    V = rng.standard_normal((k, 7))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    g = rng.standard_normal(7) * 10 ** rng.uniform(-1.5, 0.5) + rng.uniform(-1, 1) * V.sum(0)
    phi, n = 0.1, float(g @ g)
    pi = phi - V @ g / n

    def objective(z):
        return np.sum((z[:k] @ V + z[k] * g) ** 2) - z[k] * phi * n

    w = constrained_weights(V @ V.T, V @ g, n, phi)
    mine = objective(np.append(w, max(0.0, pi @ w)))
    best = min(
        (
            scipy.optimize.minimize(
                objective,
                np.append(start, max(0.0, pi @ start)),
                bounds=[(0, None)] * (k + 1),
                constraints=[
                    {"type": "eq", "fun": lambda z: z[:k].sum() - 1},
                    {"type": "ineq", "fun": lambda z: z[k] - z[:k] @ pi},
                ],
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            )
            for start in (np.full(k, 1 / k), w)
        ),
        key=lambda r: r.fun,
    )
    assert abs(w.sum() - 1) < 1e-9
    assert w.min() >= 0
    assert mine <= best.fun + 1e-7 * (1 + abs(best.fun))


def test_forums_direction_is_what_torch_func_finds() -> None:
    model, train, validation = net(), batch(1), batch(2)
    method = make("forum", inner_lr=0.1, steps=3)
    theta, losses, _ = functional(model)
    alpha, ahead = torch.zeros(3, dtype=torch.float64), theta.clone()
    for _ in range(3):
        ahead = ahead - 0.1 * grad(lambda t: losses(t, train).mean())(ahead)
    q = [
        grad(lambda a: torch.softmax(a, 0) @ (losses(theta, train) - losses(ahead, train)))(alpha),
        grad(lambda t: losses(t, train).mean())(theta),
    ]
    q = torch.cat(q)
    V = jacrev(losses)(theta, validation)
    V = torch.cat([torch.zeros(3, 3, dtype=V.dtype), V / V.norm(dim=1, keepdim=True)], 1)
    n = float(q @ q) + 1e-8
    w = torch.as_tensor(constrained_weights((V @ V.T).numpy(), (V @ q).numpy(), n, 0.1))
    d = w @ V + max(0.0, float(w @ (0.1 - V @ q / n))) * q
    backward(model, method, [train, validation])
    assert relative(gradient(model), d[3:]) < 1e-7


@pytest.mark.parametrize("apart", [True, False])
def test_f_mtl_takes_gradients_uphill(apart: bool) -> None:
    model, rows = net(), batch(3)
    method = make("f_mtl", inner="mgda", rho=0.1, apart=apart)
    theta, losses, n = functional(model)
    G = jacrev(losses)(theta, rows)
    unit = torch.cat([part / part.norm(dim=1, keepdim=True) for part in (G[:, :n], G[:, n:])], 1)
    S = torch.stack([grad(lambda t, i=i: losses(t, rows)[i])(theta + 0.1 * unit[i]) for i in range(3)])
    A = make("mgda").direction
    d = A(G[:, :n]) + A((S - G)[:, :n]) if apart else A(S[:, :n])
    backward(model, method, [rows])
    assert relative(gradient(model), torch.cat([d, S[:, n:].sum(0)])) < 1e-6


@pytest.mark.parametrize("name", ["f_mtl", "samo"])
@pytest.mark.parametrize("inner", ["cagrad", "upgrad", "mgda", "pcgrad"])
def test_a_vanishing_way_uphill_leaves_the_inner_method(name: str, inner: str) -> None:
    model, rows = net(), batch(3)
    backward(model, make(name, inner=inner, rho=1e-9), [rows])
    found = gradient(model)
    backward(model, make(inner), [rows])
    assert relative(found, gradient(model)) < 1e-6


def test_samo_goes_uphill_by_mean_and_probe() -> None:
    model, rows = net(), batch(3)
    theta, losses, n = functional(model)
    mean = grad(lambda t: losses(t, rows).mean())(theta)
    method = make("samo", inner="mgda", rho=0.05, alpha=0.7, epsilon=0.02, seed=4)
    seeds = np.random.default_rng(4)
    sizes = [p.numel() for p in model.shared_parameters()]
    S = []
    for i in range(3):
        z = torch.randn(n, generator=torch.Generator().manual_seed(int(seeds.integers(2**62))), dtype=torch.float64)
        probe = torch.cat([0.02 * z, torch.zeros(len(theta) - n)])
        slope = (losses(theta + probe, rows)[i] - losses(theta - probe, rows)[i]) / 0.04
        layers = zip(torch.split(mean[:n], sizes), torch.split(slope * z, sizes), strict=True)
        e = torch.cat([0.7 * g + 0.3 * g.norm() * local / local.norm() for g, local in layers])
        own = torch.zeros(len(theta) - n, dtype=torch.float64)
        place = slice(i * 7, i * 7 + 7)  # six weights and a bias a head
        own[place] = mean[n:][place] / mean[n:][place].norm()
        step = torch.cat([e / e.norm(), own])
        S.append(grad(lambda t, i=i: losses(t, rows)[i])(theta + 0.05 * step))
    S = torch.stack(S)
    backward(model, method, [rows])
    assert relative(gradient(model), torch.cat([make("mgda").direction(S[:, :n]), S[:, n:].sum(0)])) < 1e-6


def test_an_inner_method_that_looks_again_is_refused() -> None:
    for inner in ("modo", "famo", "samo"):
        with pytest.raises(InputError, match=f"looks once a step, which {inner} does not"):
            make("f_mtl", inner=inner)


# ---- validation losses ----


def fed(method, history):
    """The weights of each step where the validation losses are those given and the training losses do not matter."""
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    method.bind(NAMES)
    found = []
    for values in history:
        rows = {"train": dict.fromkeys(NAMES, 1.0), "validation": dict(zip(NAMES, values, strict=True))}
        seen = polytask.backward_batches(
            lambda role, rows=rows: {n: v * x.sum() / 2 for n, v in rows[role].items() if v == v},
            ["train", "validation"],
            shared=[x],
            balancer=method,
        )
        found.append(seen.weights.numpy())
    return found


def softmax(v):
    return np.exp(v - np.max(v)) / np.exp(v - np.max(v)).sum()


def falling(steps: int) -> np.ndarray:
    t = np.arange(steps)[:, None]
    return np.array([3.0, 1.0, 0.5]) * np.exp(-t * np.array([0.2, 0.05, -0.02])) + 0.01 * np.sin(7 * t + np.arange(3))


def test_coba_follows_its_formula() -> None:
    steps, N, warmup, tau = 14, 6, 4, 5.0
    history = falling(steps)
    ratio = history / history[0]
    slopes, largest = [], []
    for t, found in enumerate(fed(make("coba", window=N, warmup=warmup, tau=tau), history), 1):
        if t <= warmup:
            np.testing.assert_allclose(found, 1 / 3)
            continue
        last = slice(max(0, t - N), t)
        when = np.arange(steps)[last]
        slopes.append([np.polyfit(when, ratio[last, i], 1)[0] for i in range(3)])
        largest.append(np.polyfit(when, ratio[last].max(1), 1)[0])
        a, A, m = np.array(slopes[-1]), np.array(slopes[-N:]), np.array(largest[-N:])
        relative_score = softmax(3 * a / np.abs(a).sum())
        absolute_score = softmax(-len(A) * a / np.abs(A).sum(0))
        factor = min(1.0, len(m) * softmax(-tau * len(m) * m / np.abs(m).sum())[-1])
        np.testing.assert_allclose(found, factor * relative_score + (1 - factor) * absolute_score, rtol=1e-6)


def test_coba_turns_from_the_slow_to_the_falling_as_the_model_diverges() -> None:
    t = np.arange(30)[:, None]
    converging = np.concatenate([3 * np.exp(-0.2 * t), 2 * np.exp(-0.02 * t), np.exp(-0.1 * t)], 1)
    w = fed(make("coba", window=10, warmup=5), converging)[6]
    assert w[1] == w.max()  # the slowest
    diverging = converging.copy()
    diverging[15:, 1] = diverging[14, 1] * np.exp(0.1 * np.arange(1, 16))
    w = fed(make("coba", window=10, warmup=5), diverging)[-1]
    assert w[1] == w.min()


def test_self_paced_follows_its_formula() -> None:
    history = falling(9)
    for t, found in enumerate(fed(make("self_paced", window=5, sharpness=7.0), history), 1):
        last = slice(max(0, t - 5), t)
        a = np.array([np.polyfit(np.arange(9)[last], history[last, i], 1)[0] if t > 1 else 0.0 for i in range(3)])
        n = 3 * a / np.abs(a).sum() if t > 1 else a
        np.testing.assert_allclose(found, softmax(-7 * softmax(n) * n), rtol=1e-6)


@pytest.mark.parametrize("name", ["coba", "self_paced"])
def test_the_scale_of_a_validation_history_does_not_matter(name: str) -> None:
    for c in (1e-8, 1e8):
        for v, w in zip(
            fed(build(METHODS[name]), falling(10)), fed(build(METHODS[name]), c * falling(10)), strict=True
        ):
            np.testing.assert_allclose(w, v, rtol=1e-5)


@pytest.mark.parametrize("name", ["coba", "self_paced"])
def test_a_task_that_a_validation_batch_lacks_keeps_its_history(name: str) -> None:
    history = falling(10)
    method = build(METHODS[name])
    fed(method, history[:8])
    before = method.state["history"].copy()
    history[8, 1] = np.nan
    assert np.isfinite(fed(method, history[8:9])[0]).all()
    assert np.array_equal(method.state["history"][1], before[1], equal_nan=True)
    assert not np.array_equal(method.state["history"][0], before[0], equal_nan=True)


# ---- the mechanism ----


@pytest.mark.parametrize("name", LOOKING)
def test_nothing_but_gradients_is_left_behind(name: str) -> None:
    """Parameters, averages of batches and random numbers are as after one look at each training batch; losses see the same masks."""
    model, plain = net(dropout=0.3, norm=True), net(dropout=0.3, norm=True)
    method = build(METHODS[name])
    batches = [batch(i) for i in range(len(method.roles))]
    torch.manual_seed(5)
    backward(model, method, batches)
    torch.manual_seed(5)
    for role, rows in zip(method.roles, batches, strict=True):
        now = copy.deepcopy(dict(plain.named_buffers()))
        plain(rows[0])
        if role == "validation":
            for n, b in plain.named_buffers():
                b.data.copy_(now[n])
    for p, q in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is not None


def test_repeated_looks_see_the_same_masks_and_first_ones_new_masks() -> None:
    x = torch.ones(200)
    evaluations = Evaluations(
        lambda rows: [nn.functional.dropout(rows).sum()], [x, x, x], ("train", "train", "validation")
    )
    torch.manual_seed(0)
    first = [float(evaluations(i)[0]) for i in (0, 1, 2)]
    before = torch.get_rng_state()
    assert [float(evaluations(i)[0]) for i in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert len(set(first)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_come_back_when_a_look_fails() -> None:
    model, train, calls = net(), batch(1), []
    before = [p.clone() for p in model.parameters()]

    def evaluate(rows):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("no more")
        return losses_of(model, rows)

    with pytest.raises(KeyError):
        polytask.backward_batches(evaluate, [train, train], balancer=make("auto_lambda"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["equal", "mgda", "uncertainty", "pcgrad"])
def test_methods_that_look_once_are_handed_on(name: str) -> None:
    model, rows = net(), batch(1)
    backward(model, make(name), [rows], features=lambda: model.features)
    found = gradient(model)
    model.zero_grad()
    polytask.backward(losses_of(model, rows), balancer=make(name), features=model.features)
    assert relative(found, gradient(model)) < 1e-12


@pytest.mark.parametrize("name", LOOKING)
def test_gradients_are_added_and_groups_found(name: str) -> None:
    model = net()
    method = build(METHODS[name])
    batches = [batch(i) for i in range(len(method.roles))]
    # SAMO's probes are drawn in the order of the parameters, which is the graph's where none are named
    found = {"shared": model.trunk} if name == "samo" else {}
    polytask.backward_batches(lambda rows: losses_of(model, rows), batches, balancer=copy.deepcopy(method), **found)
    once = gradient(model)
    polytask.backward_batches(
        lambda rows: losses_of(model, rows), batches, balancer=copy.deepcopy(method), shared=model.trunk
    )
    assert relative(gradient(model), 2 * once) < 1e-12


@pytest.mark.parametrize("name", LOOKING)
def test_a_task_missing_from_a_training_batch_is_absent(name: str) -> None:
    model = net()
    method, twin = build(METHODS[name]), build(METHODS[name])
    method.bind(NAMES)
    twin.bind(NAMES)
    batches = [batch(i) for i in range(len(method.roles))]

    def lacking(rows, first=batches[0]):
        found = losses_of(model, rows)
        return {n: v for n, v in found.items() if n != "b" or rows is not first}

    model.zero_grad()
    seen = polytask.backward_batches(lacking, batches, balancer=method, shared=model.trunk)
    assert seen.tasks == ("a", "c")
    assert model.heads[1].weight.grad is None
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    polytask.backward_batches(
        lambda rows: {n: v for n, v in losses_of(model, rows).items() if n != "b"},
        batches,
        balancer=twin,
        shared=model.trunk,
    )
    assert relative(found, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])) < 1e-12
    nothing = polytask.backward_batches(lambda rows: {}, batches, balancer=method)
    assert (nothing.taken, nothing.tasks) == (False, ())


@pytest.mark.parametrize("name", LOOKING)
def test_float16s_scale_passes_through_and_an_overflow_skips_the_step(name: str) -> None:
    model = net().float()
    method, scaled = build(METHODS[name]), build(METHODS[name])
    batches = [tuple(t.float() for t in batch(i)) for i in range(len(method.roles))]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(2):
        backward(model, method, batches)
        plain = gradient(model)
        backward(model, scaled, batches, scaler=scaler)
        assert relative(gradient(model) / 2**10, plain) < 1e-4
    state = scaled.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.clone() for p in model.parameters()]

    def spoilt(rows):  # a finite loss whose slope is infinite
        found = losses_of(model, rows)
        found["b"] = found["b"] + (found["b"].detach() * 0 + model.trunk[0].weight.sum() * 0.0).sqrt()
        return found

    seen = polytask.step(
        spoilt, batches, optimizer=optimizer, balancer=scaled, scaler=scaler, shared=model.shared_parameters()
    )
    assert not seen.taken
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2**9
    assert str(scaled.state_dict()) == str(state)
    with pytest.raises(TrainingError, match="the gradient of"):
        polytask.backward_batches(spoilt, batches, balancer=scaled, shared=model.shared_parameters())
    model.zero_grad()
    state = scaled.state_dict()
    seen = polytask.backward_batches(
        spoilt, batches, balancer=scaled, shared=model.shared_parameters(), on_nonfinite="skip-step"
    )
    assert not seen.taken
    assert all(p.grad is None for p in model.parameters())
    assert str(scaled.state_dict()) == str(state)


@pytest.mark.parametrize("name", ["modo", "moml", "coba", "f_mtl"])
def test_a_loss_that_is_not_finite_is_named_or_its_step_skipped(name: str) -> None:
    model = net()
    method = build(METHODS[name])
    batches = [batch(i) for i in range(len(method.roles))]

    def spoilt(rows):
        found = losses_of(model, rows)
        return {**found, "c": found["c"] * float("inf")}

    model.zero_grad()
    with pytest.raises(TrainingError, match="the loss of task 'c' is inf"):
        polytask.backward_batches(spoilt, batches, balancer=method)
    assert not polytask.backward_batches(spoilt, batches, balancer=method, on_nonfinite="skip-step").taken
    assert all(p.grad is None for p in model.parameters())


def test_a_step_is_the_loop_written_out() -> None:
    """polytask.step against its parts, for FAMO's second look and for a method of two batches."""
    for name in ("famo", "auto_lambda"):
        model, written = net(dropout=0.2), net(dropout=0.2)
        method, other = make(name), make(name)
        sgd = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, written)]
        for number in range(3):
            batches = [batch(10 * number + i) for i in range(len(method.roles))]
            torch.manual_seed(number)
            polytask.step(
                lambda rows, m=model: losses_of(m, rows), batches, optimizer=sgd[0], balancer=method, clip_norm=1.0
            )
            torch.manual_seed(number)
            sgd[1].zero_grad()
            if name == "famo":
                polytask.backward(losses_of(written, batches[0]), balancer=other)
            else:
                polytask.backward_batches(functools.partial(losses_of, written), batches, balancer=other)
            nn.utils.clip_grad_norm_(written.parameters(), 1.0)
            sgd[1].step()
            if name == "famo":
                torch.manual_seed(number)
                other.after_step({n: v.detach() for n, v in losses_of(written, batches[0]).items()})
        for p, q in zip(model.parameters(), written.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=0)


def test_what_cannot_work_is_refused() -> None:
    model, rows = net(), batch(1)
    with pytest.raises(InputError, match=r"modo takes 3 batches \(train, train, train\) a step, not 1"):
        backward(model, make("modo"), [rows])
    with pytest.raises(InputError, match="mgda takes 1 batch a step, not 2"):
        backward(model, make("mgda"), [rows, rows])
    with pytest.raises(InputError, match=r"samo looks at the model more than once.*backward_batches"):
        polytask.backward(losses_of(model, rows), balancer=make("samo"))
    with pytest.raises(InputError, match="those of representations differ"):
        backward(model, make("moml"), [rows, rows], level="representation")
    with pytest.raises(InputError, match="no option 'features_of'"):
        polytask.step(losses_of, [rows], optimizer=None, balancer=make("mgda"), features_of=1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", [n for n in METHODS if looks_again(make(n))])
def test_a_batch_of_one_task_shares_nothing(name: str, every: int) -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), nn.ModuleDict({n: nn.Linear(4, 1) for n in "abc"})
    x = torch.randn(8, 3)
    balancer = make(name, every=every)
    balancer.bind(["a", "b", "c"])

    def losses(present: str) -> dict[str, torch.Tensor]:
        return {n: (heads[n](trunk(x).tanh()) - k).square().mean() for k, n in enumerate("abc") if n in present}

    for present in ("abc", "b", "b", "ac", "c", "abc"):
        trunk.zero_grad()
        seen = polytask.backward_batches(losses, [present] * len(balancer.roles), balancer=balancer)
        assert seen.tasks == tuple(present)
        assert trunk.weight.grad is not None
        assert bool(torch.isfinite(trunk.weight.grad).all())
        assert bool(trunk.weight.grad.any())

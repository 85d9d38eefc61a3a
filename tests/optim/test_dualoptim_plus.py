"""DualOptim+ against its definition: the published step, its two limits, eight bits, and that it behaves like an optimizer."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polytask.errors import InputError
from polytask.optim import DualOptimPlus, turns
from polytask.optim.blockwise import BLOCK, code_book, dequantise, quantise

P = 5


def parameter(n=P, seed=3):
    return nn.Parameter(torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def run(theta, optimizer, gradients, objectives):
    """The parameters after every step, as the gradients are given."""
    path = []
    for g, o in zip(gradients, objectives, strict=False):
        theta.grad = g.clone()
        optimizer.step(objective=o)
        path.append(theta.detach().clone())
    return torch.stack(path)


def draw(steps, n=P, seed=0):
    return torch.randn(steps, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def published(theta, gradients, objectives, factors, lr, wd=0.01, b=(0.9, 0.95), B=(0.9, 0.95), eps=1e-8):
    """The published step, written out coordinate by coordinate in plain floating point."""
    n = len(theta)
    mB, vB, T = [0.0] * n, [0.0] * n, 0
    own = {o: {"m": [0.0] * n, "v": [0.0] * n, "t": 0} for o in factors}
    x, path = theta.tolist(), []
    for row, o in zip(gradients.tolist(), objectives, strict=False):
        s = own[o]
        T, s["t"] = T + 1, s["t"] + 1
        rate = factors[o] * lr
        for i, g in enumerate(row):
            x[i] *= 1 - rate * wd
            m_hat = mB[i] / (1 - B[0] ** (T - 1)) if T > 1 else mB[i]
            v_hat = vB[i] / (1 - B[1] ** (T - 1)) if T > 1 else vB[i]
            s["m"][i] = b[0] * s["m"][i] + (1 - b[0]) * (g - m_hat)
            s["v"][i] = b[1] * s["v"][i] + (1 - b[1]) * (g * g - v_hat)
            num = s["m"][i] / (1 - b[0] ** s["t"]) + m_hat
            den = math.sqrt(abs(s["v"][i] / (1 - b[1] ** s["t"]) + v_hat)) + eps
            x[i] -= rate * num / den
            mB[i], vB[i] = B[0] * mB[i] + (1 - B[0]) * g, B[1] * vB[i] + (1 - B[1]) * g * g
        path.append(list(x))
    return torch.tensor(path, dtype=torch.float64)


@pytest.mark.parametrize("foreach", [True, False])
def test_it_takes_the_published_steps(foreach):
    factors = {"forget": 0.5, "retain": 1.0}
    gradients, order = draw(24), list(itertools.islice(turns({"forget": 1, "retain": 2}), 24))
    theta = parameter()
    expected = published(theta.detach(), gradients, order, factors, 1e-2)
    optimizer = DualOptimPlus([theta], factors, lr=1e-2, foreach=foreach)
    torch.testing.assert_close(run(theta, optimizer, gradients, order), expected, rtol=1e-12, atol=1e-14)


def test_the_first_step_of_one_objective_is_adams():
    ours, adams = parameter(), parameter()
    adam = torch.optim.AdamW([adams], lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
    adams.grad = draw(1)[0]
    adam.step()
    found = run(ours, DualOptimPlus([ours], ["only"], lr=0.1), draw(1), ["only"])
    torch.testing.assert_close(found[0], adams.detach(), rtol=1e-12, atol=0)


def test_where_the_objectives_agree_the_base_has_everything():
    G, theta = draw(1)[0], parameter()
    optimizer = DualOptimPlus([theta], lr=1e-3)
    run(theta, optimizer, G.expand(600, -1), turns({"forget": 1, "retain": 1}))
    assert all(float(optimizer.moment(theta, "m", o).abs().max()) < 1e-12 for o in ("forget", "retain"))
    torch.testing.assert_close(optimizer.moment(theta, "m"), G, rtol=1e-12, atol=0)


def test_where_the_base_averages_to_nothing_each_objective_has_its_own_adam():
    # Theorem 3.2: m = -(1 - B^Fr) / (B^Fr (1 - B^Ff)) n with n = 1, Ff = 1, Fr = 5, B = 0.9
    n, m, theta = 1.0, -6.935087808, parameter(1)
    assert m == pytest.approx(-(1 - 0.9**5) / (0.9**5 * 0.1) * n, rel=1e-9)
    optimizer = DualOptimPlus([theta], lr=1e-3)
    order = list(itertools.islice(turns({"forget": 1, "retain": 5}), 600))
    run(theta, optimizer, torch.tensor([[m if o == "forget" else n] for o in order], dtype=torch.float64), order)
    # after 600 steps the next one forgets: the base it would read
    assert abs(float(optimizer.moment(theta, "m"))) < 1e-8
    assert float(optimizer.moment(theta, "m", "forget")) == pytest.approx(m, rel=1e-4)


def test_without_a_base_it_is_one_adam_for_each_objective():
    gradients, order = draw(40), list(itertools.islice(turns({"a": 1, "b": 3}), 40))
    ours, theirs = parameter(), parameter()
    optimizer = DualOptimPlus([ours], ["a", "b"], lr=1e-2, states="delta")
    adams = {o: torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01) for o in ("a", "b")}
    path = run(ours, optimizer, gradients, order)
    for g, o, x in zip(gradients, order, path, strict=True):
        theirs.grad = g.clone()
        adams[o].step()
        torch.testing.assert_close(x, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_without_deltas_a_step_does_not_depend_on_whose_turn_it_is():
    gradients = draw(30)
    one, other = parameter(), parameter()
    a = run(one, DualOptimPlus([one], lr=1e-2, states="base"), gradients, turns({"forget": 1, "retain": 5}))
    b = run(other, DualOptimPlus([other], lr=1e-2, states="base"), gradients, turns({"retain": 1}))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a[0], a[-1])


def test_the_floor_shortens_only_the_steps_where_the_second_moments_cancel():
    gradients = draw(30, 2000)
    order = list(itertools.islice(turns({"forget": 1, "retain": 1}), 30))
    steps = {}
    for floor in (0.0, 0.01):
        theta = parameter(2000)
        path = run(theta, DualOptimPlus([theta], lr=1.0, weight_decay=0.0, floor=floor), gradients, order)
        steps[floor] = path.diff(dim=0).abs()
    changed = steps[0.0] > steps[0.01] * (1 + 1e-9)
    assert 0 < float(changed.double().mean()) < 0.05
    assert float(steps[0.0].max()) > 2 * float(steps[0.01].max())
    torch.testing.assert_close(steps[0.0][~changed], steps[0.01][~changed], rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=30),
    st.integers(0, 2**20),
    st.floats(1e-4, 1e4),
    st.booleans(),
)
def test_a_step_does_not_depend_on_the_unit_of_the_loss(order, seed, scale, foreach):
    gradients = draw(len(order), seed=seed)
    one, other = parameter(), parameter()
    make = {"objectives": "abc", "lr": 1e-2, "eps": 1e-30, "floor": 0.01, "foreach": foreach}
    a = run(one, DualOptimPlus([one], **make), gradients, order)
    b = run(other, DualOptimPlus([other], **make), scale * gradients, order)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 64), nn.Linear(64, 2)).to(dtype)


def train(model, optimizer, steps, start=0):
    dtype = next(model.parameters()).dtype
    g = torch.Generator().manual_seed(9)
    X, Y = torch.randn(12, 16, 8, generator=g).to(dtype), torch.randn(12, 16, 2, generator=g).to(dtype)
    for step, o in itertools.islice(enumerate(turns({"forget": 1, "retain": 2})), start, start + steps):
        optimizer.zero_grad()
        loss = ((model(X[step]) - Y[step]) ** 2).mean()
        (-0.1 * loss if o == "forget" else loss).backward()
        optimizer.step(objective=o)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_restarted_run_goes_on_bit_for_bit(bits, dtype, tmp_path):
    options = {"lr": 1e-2, "bits": bits}
    straight = network(dtype=dtype)
    expected = train(straight, DualOptimPlus(straight.parameters(), **options), 12)
    first = network(dtype=dtype)
    optimizer = DualOptimPlus(first.parameters(), **options)
    train(first, optimizer, 7)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second = network(seed=5, dtype=dtype)
    second.load_state_dict(saved["model"])
    resumed = DualOptimPlus(second.parameters(), lr=1.0, bits=bits)
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, train(second, resumed, 5, start=7), expected))


def test_together_and_one_by_one_agree_also_where_parameters_have_seen_different_objectives():
    found = []
    for foreach in (True, False):
        shared, mine, frozen = parameter(), parameter(3, seed=4), parameter(2, seed=5)
        optimizer = DualOptimPlus([shared, mine, frozen], lr=1e-2, foreach=foreach)
        for g, h, o in zip(draw(20), draw(20, 3, seed=1), turns({"forget": 1, "retain": 3}), strict=False):
            shared.grad, mine.grad = g.clone(), h.clone() if o == "retain" else None
            optimizer.step(objective=o)
        found.append([p.detach() for p in (shared, mine, frozen)])
        assert float(optimizer.moment(mine, "m", "forget").abs().max()) == 0
        assert not optimizer.state.get(frozen)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    assert torch.equal(found[0][2], parameter(2, seed=5).detach())


def test_an_objective_never_called_keeps_a_delta_of_zero():
    theta = parameter()
    optimizer = DualOptimPlus([theta], lr=1e-2)
    run(theta, optimizer, draw(10), ["retain"] * 10)
    assert all(bool((optimizer.moment(theta, k, "forget") == 0).all()) for k in ("m", "v"))
    assert all(bool((optimizer.moment(theta, k, "retain") != 0).all()) for k in ("m", "v"))


@pytest.mark.parametrize("which", ["both", "base", "delta"])
def test_eight_bits_keep_the_asked_states_in_bytes_and_follow_the_full_precision(which):
    paths = {}
    for bits in (8, 32):
        model = network()
        optimizer = DualOptimPlus(model.parameters(), lr=1e-3, bits=bits, quantised=which, floor=0.01)
        paths[bits] = torch.cat([p.flatten() for p in train(model, optimizer, 12)])
        wide = optimizer.state[model[2].weight]  # 128 x 64 = 8192 entries
        small = optimizer.state[model[0].weight]
        assert not any(k.endswith(".codes") for k in small)
        coded = {k.removesuffix(".codes") for k in wide if k.endswith(".codes")}
        deltas = {f"{k}:{o}" for k in "mv" for o in ("forget", "retain")}
        expected = {"both": {"m", "v"} | deltas, "base": {"m", "v"}, "delta": deltas}[which]
        assert coded == (expected if bits == 8 else set())
        assert all(wide[f"{k}.codes"].dtype == torch.uint8 for k in coded)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    travelled = paths[32] - start
    assert 0 < float((paths[8] - paths[32]).norm()) < 0.1 * float(travelled.norm())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 1000), st.floats(1e-20, 1e20), st.booleans())
def test_quantisation_is_relative_to_the_block_and_keeps_zeros_and_the_largest(seed, n, scale, signed):
    x = scale * torch.randn(n, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x if signed else x.abs()
    x[::7] = 0
    codes, scales = quantise(x, signed)
    back = dequantise(codes, scales, signed)
    assert codes.dtype == torch.uint8
    assert len(scales) == -(-n // BLOCK)
    widest = float(code_book(signed).diff().max())  # the coarsest step of the book, a few per cent of the largest
    largest = scales.repeat_interleave(BLOCK)[:n]
    assert bool(((back - x).abs() <= 0.51 * widest * largest).all())
    assert bool((back[x == 0] == 0).all())
    assert bool(((back - x).abs() <= 0.4 * x.abs() + 1e-6 * largest).all())


def test_code_books_are_ascending_and_full():
    for signed in (True, False):
        book = code_book(signed)
        assert len(book) == 256
        assert bool((book.diff() > 0).all())
        assert float(book[-1]) == 1
        assert bool((book >= 0).all()) != signed
        assert 0.0 in book.tolist()


def test_half_precision_parameters_keep_moments_in_single():
    theta = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = DualOptimPlus([theta], ["o"], lr=0.1)
    theta.grad = torch.full((4,), 0.5, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.moment(theta, "m").dtype == torch.float32
    assert float(theta.detach()[0]) == pytest.approx(1 - 0.1, rel=0.01)


def test_a_scaler_and_a_scheduler_drive_it():
    theta = parameter()
    optimizer = DualOptimPlus([theta], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    theta.grad = torch.ones_like(theta)
    optimizer.step(objective="retain")
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.5


def test_turns_repeat_in_order_and_refuse_nonsense():
    assert list(itertools.islice(turns({"a": 1, "b": 2, "c": 0}), 7)) == ["a", "b", "b", "a", "b", "b", "a"]
    for wrong in ({}, {"a": 0}, {"a": 1, "b": -1}):
        with pytest.raises(InputError, match="steps a round"):
            turns(wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"objectives": []},
        {"objectives": {"a": 0.0}},
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"base_betas": (0.9, -0.1)},
        {"eps": 0.0},
        {"weight_decay": math.nan},
        {"floor": -1.0},
        {"states": "none"},
        {"bits": 4},
        {"quantised": "all"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_refuses_options_by_name(options):
    name = next(iter(options))
    with pytest.raises(InputError, match=f"dualoptim_plus takes as {name}"):
        DualOptimPlus([parameter()], **options)


def test_refuses_an_unknown_objective_and_a_foreign_state_before_anything_moves():
    theta = parameter()
    before = theta.detach().clone()
    optimizer = DualOptimPlus([theta])
    theta.grad = torch.ones_like(theta)
    for wrong in (None, "remember"):
        with pytest.raises(InputError, match="forget, retain"):
            optimizer.step(objective=wrong)
    assert torch.equal(theta.detach(), before)
    optimizer.step(objective="retain")
    with pytest.raises(InputError, match="other objectives"):
        DualOptimPlus([parameter()], ["a", "b"]).load_state_dict(optimizer.state_dict())

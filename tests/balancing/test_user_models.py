"""The models that people bring: recurrent, attending, normalising, dropping out, compiled, checkpointed, in half precision."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._functorch.config as functorch
from torch import nn
from torch.utils.checkpoint import checkpoint

import polytask
from polytask.balancing import Accumulation, make
from polytask.errors import InputError
from polytask.models import HardSharing

NAMES = ("a", "b", "c")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(self.embed(x)).mean(1)


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Conv1d(6, 6, 3)
        )

    def forward(self, x):
        return self.body(x.transpose(1, 2)).mean(2)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return self.body(x.mean(1))


class TwoScales(nn.Module):
    """A trunk with a dict of features, read by the heads in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 6), nn.Linear(6, 5)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(11, 1), "c": nn.Linear(5, 1)})

    def forward(self, x):
        low = torch.tanh(self.low(x.mean(1)))
        self.features = {"low": low, "high": torch.tanh(self.high(low))}
        high = self.features["high"]
        read = {"a": low, "b": torch.cat([low, high], 1), "c": high}
        return {n: self.heads[n](read[n]) for n in NAMES}


TRUNKS = {"lstm": Recurrent, "attention": Attending, "convolution": Convolving, "dense": Dense}


def model(trunk: nn.Module, dtype=torch.float64, deep=True) -> HardSharing:
    torch.manual_seed(0)
    for layer in trunk.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    heads = {n: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)) if deep else nn.Linear(6, 1) for n in NAMES}
    return HardSharing(trunk, heads).to(dtype)


def losses_of(m, dtype=torch.float64, size=1.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 5, 4, generator=generator, dtype=dtype)
    y = torch.randn(12, 3, generator=generator, dtype=dtype)
    torch.manual_seed(7)  # the same dropout masks in every forward pass
    outputs = m(x)
    return {n: ((outputs[n][:, 0] - y[:, i]).float() ** 2).mean() * size for i, n in enumerate(NAMES)}


def rows_at(losses, tensors):
    found = []
    for loss in losses.values():
        g = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        found.append(
            torch.cat([(torch.zeros_like(t) if h is None else h).flatten() for t, h in zip(tensors, g, strict=True)])
        )
    return torch.stack(found)


def trunk_gradient(m):
    return torch.cat([p.grad.flatten() for p in m.trunk.parameters()])


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
@pytest.mark.parametrize("level", ["exact", "streamed", "representation"])
def test_trunks_of_every_kind(trunk, level, monkeypatch) -> None:
    if level == "streamed":
        monkeypatch.setattr("polytask.balancing.exact.STREAM_ABOVE", 0)
    m = model(trunk())
    losses = losses_of(m)
    at = [m.features["features"].tensor] if level == "representation" else list(m.trunk.parameters())
    w = make("upgrad").weights(rows_at(losses, at) @ rows_at(losses, at).T)
    expected = w @ rows_at(losses, list(m.trunk.parameters()))
    m.zero_grad()
    polytask.backward(
        losses, balancer="upgrad", shared=m.trunk, features=m.features if level == "representation" else None
    )
    assert float((trunk_gradient(m) - expected).norm()) < 1e-5 * float(expected.norm())


def test_a_dict_of_features_holds_all_that_is_shared() -> None:
    m = TwoScales().double()
    losses = losses_of(m)
    J = rows_at(losses, list(m.features.values()))
    w = make("upgrad").weights(J @ J.T)
    # one representation is computed from the other: each gradient reaches the trunk once all the same
    expected = torch.autograd.grad(
        (w * torch.stack(list(losses.values()))).sum(), list(m.low.parameters()), retain_graph=True
    )
    polytask.backward(losses, balancer="upgrad", features=m.features)
    for p, g in zip(m.low.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("level", ["values", "exact", "one pass", "two passes"])
def test_float16_autocast_with_one_scaler(level) -> None:
    """The first scales overflow: those steps are skipped and change no state; then the scaled step is the float32 one."""

    def run(half: bool):
        m = model(Dense(), torch.float32)
        optimizer = torch.optim.SGD(m.parameters(), lr=3e-4)
        balancer = make("equal" if level == "values" else "gradnorm")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=half, growth_interval=10**6)
        taken, untaken = [], 0
        while sum(taken) < 5:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                losses = losses_of(m, torch.float32, size=30.0)
            features = {"one pass": m.features, "two passes": m.features["features"].tensor}.get(level)
            before = str(balancer.state_dict()) if balancer.tasks else None
            seen = polytask.backward(losses, balancer=balancer, features=features, shared=m.trunk, scaler=scaler)
            scale, kept = scaler.get_scale(), trunk_gradient(m).clone()
            scaler.step(optimizer)
            scaler.update()
            overflown = half and scaler.get_scale() < scale
            taken.append(not overflown)
            if not seen.taken:  # the gradients looked at overflowed; those further down may overflow alone
                assert overflown
                assert before is None or str(balancer.state_dict()) == before
                untaken += 1
            if not overflown:
                assert bool(torch.isfinite(kept).all())
        return m, len(taken), untaken

    (half, steps, untaken), (full, _, _) = run(True), run(False)
    assert steps > 5, "no step overflowed: this test would show nothing"
    assert untaken > 0 or level == "values"
    start = model(Dense(), torch.float32)
    for p, q, s in zip(half.trunk.parameters(), full.trunk.parameters(), start.trunk.parameters(), strict=True):
        assert float((p - q).detach().norm()) < 0.05 * float((q - s).detach().norm())


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.timeout(240)
@functorch.patch(donated_buffer=False)
def test_a_compiled_trunk(backend) -> None:
    torch._dynamo.reset()
    for level in ("representation", "exact"):
        plain, compiled = model(Dense()), model(Dense())
        inner = compiled.trunk
        compiled.trunk = torch.compile(inner, backend=backend)
        for m, body in ((plain, plain.trunk), (compiled, inner)):
            losses = losses_of(m)
            polytask.backward(
                losses, balancer="upgrad", shared=body, features=m.features if level == "representation" else None
            )
        for p, q in zip(plain.trunk.parameters(), inner.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("head", [lambda: nn.Linear(6, 1), lambda: nn.Sequential(nn.Linear(6, 1), nn.Tanh())])
@functorch.patch(donated_buffer=False)
def test_a_compiled_multi_task_model(head) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    m = HardSharing(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), {n: head() for n in NAMES})
    x = torch.randn(16, 5)
    for level in ("representation", "exact"):
        found = []
        for run in (m, torch.compile(m, backend="aot_eager")):
            m.zero_grad()
            losses = {n: (y - k).square().mean() for k, (n, y) in enumerate(run(x).items())}
            given = {"features": m.features, "level": level, "shared": m.shared_parameters()}
            assert polytask.backward(losses, balancer="upgrad", **given).level == level
            found.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
        torch.testing.assert_close(found[1], found[0])


@functorch.patch(donated_buffer=True)
def test_a_compiled_trunk_that_donates_its_buffers_says_what_to_do() -> None:
    torch._dynamo.reset()
    m = model(Dense())
    m.trunk = torch.compile(m.trunk, backend="aot_eager")
    polytask.backward(losses_of(m), balancer="upgrad", features=m.features)
    m.zero_grad()
    with pytest.raises(InputError, match="donated_buffer = False"):
        polytask.backward(losses_of(m), balancer="upgrad", level="exact")
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_activation_checkpoints_at_exact_level(reentrant, shared) -> None:
    m = model(Dense())
    polytask.backward(losses_of(m), balancer="upgrad", level="exact")
    expected = trunk_gradient(m)
    m.zero_grad()
    first = m.trunk.body[0].forward
    m.trunk.body[0].forward = lambda x: checkpoint(first, x.requires_grad_(reentrant), use_reentrant=reentrant)
    losses = losses_of(m)
    given = {"shared": m.trunk} if shared else {}
    if reentrant:
        with pytest.raises(InputError, match=r"reentrant activation checkpoints.* use_reentrant=False, or balance at"):
            polytask.backward(losses, balancer="upgrad", level="exact", **given)
        assert all(p.grad is None for p in m.parameters())
    else:
        polytask.backward(losses, balancer="upgrad", level="exact", **given)
        torch.testing.assert_close(trunk_gradient(m), expected)


def test_float16_overflow_over_micro_batches_is_left_to_the_scaler() -> None:
    m = model(Dense(), torch.float32)
    balancer = make("gradnorm")
    balancer.bind(NAMES)
    before = str(balancer.state_dict())
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    scale = float(scaler.scale(torch.ones(())))
    pieces = Accumulation(balancer, NAMES, m.trunk.parameters(), scale)
    for _ in range(2):
        pieces.add(losses_of(m, torch.float32, size=1e6))
    seen = pieces.backward()
    weight = m.trunk.body[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not seen.taken
    assert scaler.get_scale() < scale
    assert torch.equal(m.trunk.body[0].weight, weight)
    assert str(balancer.state_dict()) == before


@pytest.mark.parametrize("method", ["moco", "m_config", "excess_mtl", "db_mtl_ema", "son_goku"])
def test_gradients_that_are_remembered_are_taken_at_the_parameters(method) -> None:
    torch.manual_seed(0)
    m = HardSharing(nn.Linear(5, 6), {n: nn.Linear(6, 1) for n in NAMES})
    balancer = make(method)
    for rows in (16, 7):  # the last batch of an epoch is smaller
        losses = {n: (y - k).square().mean() for k, (n, y) in enumerate(m(torch.randn(rows, 5)).items())}
        assert polytask.backward(losses, balancer=balancer, features=m.features).level == "exact"

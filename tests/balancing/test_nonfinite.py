"""A loss or a gradient that is not finite: refused, left out with its task, or the whole step left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import make
from polytask.errors import InputError, TrainingError
from polytask.models import HardSharing

NAMES = ("a", "b", "c")
LEVELS = ["values", "exact", "streamed", "one pass", "two passes"]
METHOD = {"values": "uncertainty"}


def model() -> HardSharing:
    torch.manual_seed(0)
    heads = {n: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)) for n in NAMES}
    return HardSharing(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), heads).double()


def losses_of(m, spoil=None):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    outputs = m(x)
    found = {n: ((outputs[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate(NAMES)}
    if spoil == "loss":
        found["b"] = found["b"] * float("nan")
    if spoil == "gradient":  # a root at 0: its value is finite and its slope is not
        found["b"] = found["b"] + (outputs["b"].sum() * 0.0).sqrt()
    return found


def step(m, losses, level, balancer=None, monkeypatch=None, **options):
    features = {"one pass": m.features, "two passes": m.features["features"].tensor}.get(level)
    if level == "streamed":
        monkeypatch.setattr("polytask.balancing.exact.STREAM_ABOVE", 0)
    return polytask.backward(losses, balancer=balancer or make(METHOD.get(level, "mgda")), features=features, **options)


def some_gradients(m) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    return {n: p.grad.clone() for n, p in m.named_parameters()}


CASES = [(w, level) for w in ("loss", "gradient") for level in LEVELS if (w, level) != ("gradient", "values")]


@pytest.mark.parametrize(("spoil", "level"), CASES)
@pytest.mark.parametrize("held", [False, True])
def test_skip_task_is_the_step_without_that_task(spoil, level, held, monkeypatch) -> None:
    m = model()
    before = some_gradients(m) if held else {}
    b = make(METHOD.get(level, "mgda"))
    b.bind(NAMES)
    seen = step(m, losses_of(m, spoil), level, b, monkeypatch, on_nonfinite="skip-task")
    assert (seen.tasks, seen.skipped, seen.taken) == (("a", "c"), ("b",), True)
    twin = model()
    reference = make(METHOD.get(level, "mgda"))
    reference.bind(NAMES)
    fewer = losses_of(twin)
    del fewer["b"]
    step(twin, fewer, level, reference, monkeypatch)
    for (n, p), q in zip(m.named_parameters(), twin.parameters(), strict=True):
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found - before.get(n, 0), expected, rtol=1e-9, atol=1e-12, msg=n)
    assert str(b.state_dict()) == str(reference.state_dict())


@pytest.mark.parametrize(("spoil", "level"), CASES)
@pytest.mark.parametrize("held", [False, True])
def test_skip_step_leaves_every_gradient_as_it_was(spoil, level, held, monkeypatch) -> None:
    m = model()
    before = some_gradients(m) if held else dict.fromkeys(dict(m.named_parameters()))
    b = make(METHOD.get(level, "mgda"))
    seen = step(m, losses_of(m, spoil), level, b, monkeypatch, on_nonfinite="skip-step")
    assert (seen.skipped, seen.taken, seen.weights) == (("b",), False, None)
    assert b.observation is seen
    for n, p in m.named_parameters():
        assert p.grad is None if before[n] is None else torch.equal(p.grad, before[n])


@pytest.mark.parametrize("level", LEVELS)
def test_with_every_task_skipped_no_step_is_taken(level, monkeypatch) -> None:
    m = model()
    spoilt = {n: loss * float("inf") for n, loss in losses_of(m).items()}
    seen = step(m, spoilt, level, None, monkeypatch, on_nonfinite="skip-task")
    assert (seen.tasks, seen.skipped, seen.taken) == ((), NAMES, False)
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("level", ["exact", "one pass"])
def test_between_solves_a_gradient_that_is_not_finite_is_seen_too(level) -> None:
    m = model()
    b = make("mgda", every=5)
    step(m, losses_of(m), level, b)
    m.zero_grad()
    with pytest.raises(TrainingError, match="not finite although the losses are"):
        step(m, {**losses_of(m), "b": losses_of_spoilt_trunk(m)}, level, b)
    m.zero_grad()
    seen = step(m, {**losses_of(m), "b": losses_of_spoilt_trunk(m)}, level, b, on_nonfinite="skip-step")
    assert not seen.taken
    assert all(p.grad is None for p in m.parameters())


def losses_of_spoilt_trunk(m):
    """The loss of b on the same forward pass, with a slope that is not finite at the features."""
    port = m.features["features"]
    return m.heads[1](port.copies["b"]).square().mean() + (port.copies["b"].sum() * 0.0).sqrt()


def test_a_policy_that_does_not_exist_is_refused() -> None:
    m = model()
    with pytest.raises(InputError, match="on_nonfinite is"):
        polytask.backward(losses_of(m), on_nonfinite="ignore")

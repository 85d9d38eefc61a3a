"""Directional derivatives by one forward pass are those of the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polytask
from polytask.autograd import directional_derivatives
from polytask.errors import InputError
from polytask.models import HardSharing

NAMES = ("a", "b", "c")


def model(trunk=None) -> HardSharing:
    torch.manual_seed(0)
    trunk = trunk or nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))
    return HardSharing(trunk, {n: nn.Linear(6, 1) for n in NAMES}).double()


def losses_of(m):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    torch.manual_seed(7)
    outputs = m(x)
    return {n: ((outputs[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate(NAMES)}


@pytest.mark.parametrize("training", [False, True])
def test_they_are_products_with_the_gradients(training) -> None:
    m = model().train(training)
    torch.manual_seed(3)
    direction = {n: torch.randn_like(p) for n, p in m.named_parameters() if n != "trunk.0.bias"}
    buffers = {n: b.clone() for n, b in m.named_buffers()}
    found = directional_derivatives(m, losses_of, direction)
    assert all(torch.equal(b, buffers[n]) for n, b in m.named_buffers())
    assert all(p.grad is None for p in m.parameters())
    for name, loss in losses_of(m).items():
        g = dict(
            zip(
                [n for n, _ in m.named_parameters()],
                torch.autograd.grad(loss, list(m.parameters()), retain_graph=True, allow_unused=True),
                strict=True,
            )
        )
        expected = sum((g[n] * d).sum() for n, d in direction.items() if g[n] is not None)
        torch.testing.assert_close(found[name], expected)
        assert found[name].grad_fn is None


def test_without_a_direction_they_tell_what_a_gradient_step_does() -> None:
    m = model().eval()
    polytask.backward(losses_of(m), balancer="mgda", shared=m.trunk, level="exact")
    slopes = directional_derivatives(m, losses_of)
    before = {n: v.detach() for n, v in losses_of(m).items()}
    rate = 1e-6
    with torch.no_grad():
        for p in m.parameters():
            p -= rate * p.grad
    for n, after in losses_of(m).items():
        torch.testing.assert_close((after.detach() - before[n]) / rate, slopes[n], rtol=1e-4, atol=1e-6)
        assert slopes[n] < 0  # what a method free of conflict promises


def test_a_loss_that_the_direction_does_not_touch_stands_still() -> None:
    m = model()
    direction = {n: torch.ones_like(p) for n, p in m.named_parameters() if n.startswith("heads.0")}
    found = directional_derivatives(m, losses_of, direction)
    assert found["a"] != 0
    assert found["b"] == found["c"] == 0


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return NoForwardMode.apply(self.layer(x))


def test_what_cannot_be_done_is_said() -> None:
    m = model()
    for direction, sentence in (
        (None, "no direction"),
        ({"nosuch": torch.ones(2)}, "'nosuch', which is no parameter"),
        ({"trunk.0.bias": torch.ones(2)}, r"'trunk.0.bias' has shape \(2,\) instead of \(6,\)"),
    ):
        with pytest.raises(InputError, match=sentence):
            directional_derivatives(m, losses_of, direction)
    opaque = model(Opaque())
    with pytest.raises(InputError, match="cannot be differentiated in forward mode"):
        directional_derivatives(opaque, losses_of, {"trunk.layer.bias": torch.ones(6)})

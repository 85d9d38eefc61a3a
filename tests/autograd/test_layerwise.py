"""The Gramian without the Jacobian equals the Gramian of the Jacobian, on every kind of graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from polytask.autograd import gramian, jacobian, layerwise_gradients, layerwise_gramian
from polytask.autograd.layerwise import streaming_pays


class Affine(nn.Module):
    """Parameters that are broadcast: the engine sums their gradients between two nodes."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return x * self.gain + self.shift


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Doubled(nn.Module):
    def forward(self, x):
        return Double.apply(x)


class First(nn.Module):
    def forward(self, x):
        return x[0]


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def tied():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)


TRUNKS = {
    "few examples, wide": (
        lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8, bias=False)),
        (6, 64),
    ),
    "many examples, narrow": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), (300, 6)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8)), (5, 7, 6)),
    "convolution, batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        (8, 3, 12, 12),
    ),
    "attention, dropout": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), 2),
        (4, 5, 8),
    ),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(6, 8, batch_first=True), First()), (4, 5, 6)),
    "tied weights": (tied, (5, 8)),
    "broadcast parameters": (lambda: nn.Sequential(nn.Linear(8, 8), Affine()), (5, 8)),
    "own autograd function": (lambda: nn.Sequential(nn.Linear(8, 8), Doubled(), nn.Linear(8, 8)), (5, 8)),
    "checkpoint": (lambda: nn.Sequential(nn.Linear(8, 8), Recomputed()), (5, 8)),
}


@pytest.mark.parametrize("n_tasks", [1, 3, 12])
@pytest.mark.parametrize("name", TRUNKS)
def test_equals_the_gramian_of_the_jacobian(name, n_tasks):
    torch.manual_seed(0)
    build, shape = TRUNKS[name]
    trunk = build()
    z = trunk(torch.randn(*shape))
    heads = [nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(n_tasks)]
    losses = [10.0 ** (k - 2) * (head(z) ** 2).mean() for k, head in enumerate(heads)]
    parameters = list(trunk.parameters())
    C = layerwise_gramian(losses, parameters)
    J, _ = jacobian(losses, parameters)
    reference = gramian(J)
    norms = reference.diagonal().sqrt()
    assert ((C - reference).abs() <= 1e-4 * torch.outer(norms, norms)).all()


@pytest.mark.parametrize("name", TRUNKS)
def test_combinations_of_what_layers_held(name):
    torch.manual_seed(0)
    build, shape = TRUNKS[name]
    trunk = build()
    z = trunk(torch.randn(*shape))
    losses = [(nn.Linear(8, 1)(z) ** 2).mean() for _ in range(3)]
    parameters, w = list(trunk.parameters()), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    combined = layerwise_gradients(losses, parameters, 2**20).combination(w)
    assert combined is not None
    found = {id(p): g for p, g in combined}
    expected = torch.autograd.grad((w * torch.stack(losses)).sum(), parameters)
    assert set(found) == {id(p) for p in parameters}
    largest = max(float(g.abs().max()) for g in expected)
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[id(p)], g, rtol=1e-4, atol=1e-5 * largest)


def test_combinations_of_tasks_that_do_not_meet():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    losses = [a(x).square().mean(), b(x).exp().mean(), (a(x) * b(x)).sum()]
    parameters, w = [*a.parameters(), *b.parameters()], torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    combined = dict(layerwise_gradients(losses, parameters, 1000).combination(w))
    expected = torch.autograd.grad((w * torch.stack(losses)).sum(), parameters)
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(combined[p], g)


def test_what_is_too_much_to_hold_is_let_go():
    layer = nn.Linear(16, 8)
    z = layer(torch.randn(4, 16))
    losses = [(z * k).sin().mean() for k in range(1, 4)]
    w = torch.ones(3, dtype=torch.float64)
    rows = 3 * (4 * 8 + 8)  # cotangents of the output and gradients of the bias, the cheaper form
    assert layerwise_gradients(losses, list(layer.parameters()), rows).combination(w) is not None
    assert layerwise_gradients(losses, list(layer.parameters()), rows - 1).combination(w) is None


def test_long_rows_are_multiplied_as_exactly_as_short_ones():
    """Sums of a million products in float32 alone would be off by a thousandth of a percent."""
    rows = 1 + 0.01 * torch.randn(3, 1_000_003, generator=torch.Generator().manual_seed(0))
    exact = rows.double() @ rows.double().T
    assert ((gramian(rows) - exact).abs() <= 2e-7 * exact).all()
    columns = torch.randn(3, 20_011)[:, 3:9_000]
    exact = columns.double() @ columns.double().T
    assert ((gramian(columns) - exact).abs() <= 2e-7 * exact.diagonal().max()).all()


def test_some_parameters_and_tasks_that_do_not_meet():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    h = torch.tanh(a(x))
    losses = [h.square().mean(), b(h).exp().mean(), b(x).square().mean()]
    for parameters in ([a.weight], [b.weight, b.bias], [a.weight, a.bias, b.weight, b.bias]):
        C = layerwise_gramian(losses, parameters)
        J, _ = jacobian(losses, parameters, retain_graph=True)
        torch.testing.assert_close(C, J @ J.T, rtol=1e-10, atol=1e-14)


def test_gradients_that_nearly_cancel_over_examples_are_not_taken_from_the_product_form():
    """X'D is a millionth of |X| |D|: the cheaper form would lose it in float32."""
    x = torch.ones(8, 512)
    layer = nn.Linear(512, 512, bias=False)
    y = layer(x)
    noise = torch.randn(8, 512)
    noise[4:] = -noise[:4]
    losses = [(y * (noise + 1e-4 * torch.randn(8, 512))).sum() for _ in range(2)]
    C = layerwise_gramian(losses, [layer.weight])
    J, _ = jacobian(losses, [layer.weight])
    reference = gramian(J)
    norms = reference.diagonal().sqrt()
    assert ((C - reference).abs() <= 1e-3 * torch.outer(norms, norms)).all()


@pytest.mark.parametrize(("width", "examples", "pays"), [(512, 16, True), (16, 512, False)])
def test_streaming_is_chosen_where_layers_are_wide_and_examples_few(width, examples, pays):
    trunk = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    z = trunk(torch.randn(examples, width))
    losses = [(z * k).sin().mean() for k in range(1, 4)]
    assert streaming_pays(losses, list(trunk.parameters())) is pays


@pytest.mark.parametrize("hold", [0, 2**20])
@pytest.mark.parametrize("name", TRUNKS)
def test_a_walk_agrees_with_the_engine_unless_hooks_change_gradients(name, hold):
    torch.manual_seed(0)
    build, shape = TRUNKS[name]
    trunk = build()
    for factor in (None, 2.0):
        z = trunk(torch.randn(*shape))
        if factor is not None:
            z.register_hook(lambda g, factor=factor: factor * g)
        losses = [10.0 ** (k - 2) * (nn.Linear(8, 1)(z) ** 2).mean() for k in range(4)]
        parameters = list(trunk.parameters())
        found = layerwise_gradients(losses, parameters, hold)
        assert found.agrees_with_engine(losses, parameters) is (factor is None)

"""Per-task gradients: every way of obtaining them agrees with the definition."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polytask
from polytask.autograd import Copies, DenseGradients, LinearGradients, LinearHeads, Workspace, gramian, jacobian, leaves
from polytask.balancing import make
from polytask.models import HardSharing


def test_leaves_are_found_once_and_not_behind_a_barrier():
    a, b, c = (torch.randn(3, requires_grad=True) for _ in range(3))
    z = (a * b).tanh()
    loss = (z * c).sum() + (z * a).sum()
    assert {id(t) for t in leaves(loss)} == {id(a), id(b), id(c)}
    assert [id(t) for t in leaves((z * c).sum(), stop_at=[z])] == [id(c)]
    assert leaves(a) == [a]
    assert leaves(torch.zeros(1)) == []


def test_jacobian_matches_finite_differences():
    torch.manual_seed(0)
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)

    def losses(W, b):
        h = torch.tanh(x @ W.T + b)
        return [(h[:, 0] ** 2).mean(), h[:, 1:].exp().mean(), h.sum()]

    J, _ = jacobian(losses(W, b), [W, b])
    step = 1e-6
    flat = torch.cat([W.detach().flatten(), b.detach()])
    for j in range(len(flat)):
        shift = torch.zeros_like(flat)
        shift[j] = step
        up, down = flat + shift, flat - shift
        there = torch.stack(losses(up[:12].view(4, 3), up[12:]))
        back = torch.stack(losses(down[:12].view(4, 3), down[12:]))
        torch.testing.assert_close(J[:, j], (there - back) / (2 * step), rtol=1e-6, atol=1e-8)


def test_jacobian_has_zeros_where_a_loss_does_not_reach_and_reuses_memory():
    a, b = torch.randn(2, requires_grad=True), torch.randn(3, requires_grad=True)
    memory = Workspace()
    memory.matrix(2, 5, a).fill_(float("nan"))
    J, _ = jacobian([a.sum(), (2 * b).sum()], [a, b], workspace=memory)
    assert J.tolist() == [[1, 1, 0, 0, 0], [0, 0, 2, 2, 2]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(-12, 12), st.integers(-12, 12), st.integers(0, 10**6))
def test_gramian_entries_are_exact_relative_to_the_norms_over_24_decades(k, n, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, n, generator=generator)
    exponent = torch.empty(k).uniform_(min(low, high), max(low, high) + 1e-6, generator=generator)
    rows = rows * 10.0 ** exponent[:, None]
    C = gramian(rows)
    reference = rows.double() @ rows.double().T
    norms = reference.diagonal().sqrt()
    assert (C - C.T).abs().max() == 0
    assert ((C - reference).abs() <= 1e-5 * torch.outer(norms, norms)).all()


def test_gramian_of_rows_whose_squares_underflow_or_overflow():
    rows = torch.tensor([[3e-30, 4e-30], [3e25, -4e25], [0.0, 0.0]])
    C = gramian(rows)
    torch.testing.assert_close(C.diagonal(), torch.tensor([25e-60, 25e50, 0.0], dtype=torch.float64), rtol=1e-5, atol=0)
    assert C[0, 1] == pytest.approx(-7e-5, rel=1e-5)


def test_gramian_of_half_precision_rows_is_taken_in_float32():
    rows = torch.randn(3, 4096).to(torch.bfloat16)
    torch.testing.assert_close(gramian(rows), rows.double() @ rows.double().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 1), (7,)])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
def test_linear_heads_equal_separate_heads(sizes, shape):
    torch.manual_seed(0)
    z = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    heads = {f"t{i}": nn.Linear(shape[-1], s, bias=i != 1).double() for i, s in enumerate(sizes)}
    port = LinearHeads(z, heads)
    sum((o**2).mean() for o in port.outputs.values()).backward()
    mine = [z.grad.clone(), *(p.grad.clone() for h in heads.values() for p in h.parameters())]
    z.grad = None
    for h in heads.values():
        h.zero_grad()
    sum((h(z) ** 2).mean() for h in heads.values()).backward()
    reference = [z.grad, *(p.grad for h in heads.values() for p in h.parameters())]
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_factored_gradients_equal_their_rows():
    torch.manual_seed(0)
    D, W = torch.randn(9, 6), torch.randn(6, 5)
    columns = [slice(0, 2), slice(2, 3), slice(3, 6)]
    factored = LinearGradients(D, W, columns)
    dense = DenseGradients(factored.rows())
    torch.testing.assert_close(factored.gramian(), dense.gramian(), rtol=1e-5, atol=1e-5)
    w = torch.tensor([0.3, -1.0, 2.0])
    torch.testing.assert_close(factored.combination(w), dense.combination(w), rtol=1e-5, atol=1e-5)
    some = LinearGradients(D, W, [columns[2], columns[0]])
    torch.testing.assert_close(some.gramian(), dense.gramian()[[2, 0]][:, [2, 0]], rtol=1e-5, atol=1e-5)


def test_factored_gramian_survives_the_cancellation_of_softmax_heads():
    """Softmax gradients sum to zero over classes: what the classes' weight rows share must cancel, however large it is."""
    torch.manual_seed(0)
    D = torch.randn(32, 4)
    D = D - D.mean(1, keepdim=True)
    W = 1e4 + torch.randn(4, 16)
    reference = ((D.double() @ W.double()) ** 2).sum()
    assert LinearGradients(D, W, [slice(0, 4)]).gramian().item() == pytest.approx(reference.item(), rel=1e-3)


def test_copies_add_up_to_plain_autograd_and_leave_absent_tasks_out():
    z = torch.randn(3, 4, requires_grad=True)
    port = Copies(z, ["a", "b", "c"])
    seen = []

    def combine(present, select):
        seen.append(sorted(present))
        return select(["b", "a"]).combination(torch.tensor([10.0, 1.0]))

    port.junction.combine = combine
    (port.copies["a"].sum() + (2 * port.copies["b"]).sum()).backward()
    assert seen == [["a", "b"]]
    assert torch.equal(z.grad, torch.full_like(z, 21.0))
    z.grad = None
    port = Copies(z, ["a", "b"])
    (port.copies["a"].sum() + (2 * port.copies["b"]).sum()).backward()
    assert torch.equal(z.grad, torch.full_like(z, 3.0))


def test_workspace_grows_and_hands_out_the_same_memory():
    memory = Workspace()
    like = torch.zeros(1)
    first = memory.matrix(4, 8, like)
    second = memory.matrix(2, 3, like)
    assert first.data_ptr() == second.data_ptr()
    assert memory.matrix(10, 10, like).shape == (10, 10)
    assert memory.matrix(1, 1, like.double()).dtype == torch.float64


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_no_step_outlives_itself(deep, backward):
    """A cycle through the graph is invisible to the garbage collector: each step's representation would stay for good."""
    model = HardSharing(
        nn.Linear(4, 8), {n: nn.Sequential(nn.Linear(8, 2), nn.Tanh()) if deep else nn.Linear(8, 2) for n in "ab"}
    )
    balancer = make("mgda")
    alive = []
    for _ in range(4):
        losses = {n: (o**2).mean() for n, o in model(torch.randn(3, 4)).items()}
        alive.append(weakref.ref(model.features["features"].tensor))
        if backward:
            polytask.backward(losses, balancer=balancer, features=model.features)
        del losses
    assert [r() is not None for r in alive] == [False, False, False, True]


class Doubling(torch.autograd.Function):
    """Knows no rule for batches."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return g * float(g.ne(torch.inf).all()) * 2


class TestTogether:
    """Several losses in one batched backward pass: the rows of one pass a loss."""

    @staticmethod
    def losses(trunk, x):
        torch.manual_seed(1)
        heads = [nn.Linear(8, 1) for _ in range(5)]
        z = trunk(x)
        return [(head(z) ** 2).mean() for head in heads], [list(head.parameters()) for head in heads]

    @pytest.mark.parametrize("together", [2, 3, 5, 8])
    @pytest.mark.parametrize("kind", ["perceptron", "attention", "custom function"])
    def test_same_rows(self, kind, together, caplog):
        torch.manual_seed(0)
        trunk, shape = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)), (7, 6)
        function = trunk
        if kind == "attention":
            function = trunk = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            shape = (4, 5, 8)
        elif kind == "custom function":
            function = lambda x: Doubling.apply(trunk(x))  # noqa: E731
        x = torch.randn(*shape)
        parameters = list(trunk.parameters())
        expected, apart = jacobian(*self.with_heads(function, x, parameters))
        with caplog.at_level(logging.INFO, logger="polytask"):
            rows, extra = jacobian(*self.with_heads(function, x, parameters), together=together)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-7)
        for mine, theirs in zip(extra, apart, strict=True):
            for g, h in zip(mine, theirs, strict=True):
                torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-7)
        assert ("not taken together" in caplog.text) == (kind == "custom function")

    def with_heads(self, function, x, parameters):
        losses, own = self.losses(function, x)
        return losses, parameters, own

    def test_tasks_that_do_not_reach_a_parameter(self):
        a, b = nn.Linear(3, 1), nn.Linear(3, 1)
        x = torch.randn(4, 3)
        losses = [a(x).square().mean(), b(x).square().mean(), (a(x) * b(x)).mean()]
        rows, _ = jacobian(losses, [*a.parameters(), *b.parameters()], retain_graph=True, together=3)
        expected, _ = jacobian(losses, [*a.parameters(), *b.parameters()])
        torch.testing.assert_close(rows, expected)
        assert (rows[0, 4:] == 0).all()

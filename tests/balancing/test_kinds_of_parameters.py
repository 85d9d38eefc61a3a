"""Complex, sparse and mixed parameters are balanced as the real, dense ones of one type that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import polytask
from polytask.autograd import apart, coordinates, flat, number_type, shaped
from polytask.balancing import Accumulation, make

KINDS = ("equal", "famo", "upgrad", "nash_mtl", "graddrop", "trimmed_mean", "moco", "modo", "f_mtl")


class Model(nn.Module):
    """Embeddings times a complex matrix, and a layer; ``plain`` ones are real, dense and of one type, with the same numbers."""

    def __init__(self, kind: str, plain: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4, sparse=kind == "sparse" and not plain, dtype=torch.float64)
        w = torch.zeros(4, 5, 2, dtype=torch.float64)
        self.w = nn.Parameter(torch.view_as_complex(w) if kind == "complex" and not plain else w)
        self.last = nn.Linear(5, 6, dtype=torch.float32 if kind == "mixed" and not plain else torch.float64)
        self.heads = nn.ModuleDict({n: nn.Linear(6, 1, dtype=torch.float64) for n in "abc"})
        draw = torch.Generator().manual_seed(0)
        for p in self.parameters():  # the same numbers, exact in single precision
            p.data.copy_(shaped(torch.randn(coordinates(p), generator=draw) / 2, p))

    def losses(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        x = torch.arange(12).view(6, 2)[rows] % 5
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        y = self.words(x).mean(1).to(w) @ w
        z = self.last((y.abs() + y.real - 2 * y.imag).to(self.last.weight)).tanh().double()
        return {n: (head(z) - k).square().mean() for k, (n, head) in enumerate(self.heads.items())}

    def trunk(self) -> list[nn.Parameter]:
        return [self.last.weight, self.words.weight, self.w, self.last.bias]

    def gradients(self) -> Tensor:
        return torch.cat([flat(p.grad).double() for p in [*self.trunk(), *self.heads.parameters()]])


def one_step(m: Model, method: str) -> None:
    balancer = make(method)
    polytask.backward_batches(lambda _: m.losses(), [None] * len(balancer.roles), balancer=balancer, shared=m.trunk())


def in_pieces(m: Model, method: str) -> None:
    whole = Accumulation(make(method), "abc", m.trunk())
    for rows in (slice(0, 2), slice(2, 6)):
        share = (rows.stop - rows.start) / 6
        whole.add({n: loss * share for n, loss in m.losses(rows).items()})
    whole.backward()


def compare(kind: str, fill: Callable[[Model, str], None], method: str) -> None:
    found, expected = Model(kind, plain=False), Model(kind, plain=True)
    for m in (found, expected):
        fill(m, method)
    tolerance = 1e-5 if kind == "mixed" else 1e-9
    difference = float((found.gradients() - expected.gradients()).norm() / expected.gradients().norm())
    assert difference < tolerance
    for p in found.parameters():
        assert p.grad is not None
        assert p.grad.dtype == p.dtype


@pytest.mark.parametrize("kind", ["complex", "sparse", "mixed"])
@pytest.mark.parametrize("method", KINDS)
def test_steps(kind: str, method: str) -> None:
    compare(kind, one_step, method)


@pytest.mark.parametrize("kind", ["complex", "sparse", "mixed"])
@pytest.mark.parametrize("method", ["equal", "upgrad", "graddrop"])
def test_micro_batches(kind: str, method: str) -> None:
    compare(kind, in_pieces, method)


@pytest.mark.parametrize("kind", ["complex", "sparse", "mixed"])
def test_layer_by_layer(kind: str, monkeypatch) -> None:
    monkeypatch.setattr("polytask.balancing.exact.STREAM_ABOVE", 0)
    compare(kind, one_step, "upgrad")


@pytest.mark.parametrize("kind", ["complex", "sparse", "mixed"])
def test_groups(kind: str) -> None:
    def by_groups(m: Model, method: str) -> None:
        trunk = m.trunk()
        polytask.backward(m.losses(), balancer=make(method), shared={"one": trunk[:2], "two": trunk[2:]})

    compare(kind, by_groups, "mgda")


def test_coordinates_there_and_back() -> None:
    parameters = [
        torch.randn(2, 3, dtype=torch.complex64),
        torch.randn((), dtype=torch.float64),
        torch.randn(3, dtype=torch.bfloat16),
        torch.zeros(0),
    ]
    assert number_type(parameters) == torch.float64
    vector = torch.cat([flat(p).double() for p in parameters])
    assert len(vector) == sum(map(coordinates, parameters)) == 16
    for p, again in zip(parameters, apart(vector, parameters), strict=True):
        assert again.dtype == p.dtype
        assert torch.equal(again, p)

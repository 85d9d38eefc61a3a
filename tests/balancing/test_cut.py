"""Representations computed from one another: every gradient arrives once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import GramianWeighting, make
from polytask.errors import InputError

WEIGHTS = {"low": 1.0, "high": 10.0, "both": 100.0}


class Fixed(GramianWeighting):
    """Weights that show which task is which; ones for the plain sum."""

    method = make("equal").method

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain

    def solve(self, C, losses):
        return np.ones(len(C)) if self.plain else np.array([*WEIGHTS.values()])


class Pyramid(nn.Module):
    """Three representations, each computed from those before it, and heads on one or more of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(11, 3)
        self.heads = nn.ModuleDict({"low": nn.Linear(5, 1), "high": nn.Linear(3, 1), "both": nn.Linear(14, 1)})
        self.x = torch.randn(7, 4)
        self.double()

    def losses(self) -> dict[str, torch.Tensor]:
        p = self.one(self.x.double()).tanh()
        q = self.two(p).tanh()
        r = self.three(torch.cat([p, q], 1)).tanh()
        self.features = {"p": p, "q": q, "r": r}
        read = {"low": p, "high": r, "both": torch.cat([p, q, r], 1)}
        return {n: (head(read[n]) - 1).square().mean() for n, head in self.heads.items()}

    def trunk(self) -> list[nn.Parameter]:
        return [*self.one.parameters(), *self.two.parameters(), *self.three.parameters()]


@pytest.mark.parametrize("order", [("p", "q", "r"), ("r", "q", "p"), ("q", "r", "p")])
@pytest.mark.parametrize("plain", [True, False])
def test_combinations_at_nested_representations_are_those_at_the_parameters(order, plain) -> None:
    m = Pyramid()
    losses = m.losses()
    polytask.backward(losses, balancer=Fixed(plain), features={n: m.features[n] for n in order})
    found = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    losses = m.losses()
    weights = dict.fromkeys(WEIGHTS, 1.0) if plain else WEIGHTS
    sum(weights[n] * loss for n, loss in losses.items()).backward(inputs=m.trunk(), retain_graph=True)
    sum(losses.values()).backward(inputs=[*m.heads.parameters()])
    for g, p in zip(found, m.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_two_outputs_of_one_node_do_not_come_from_each_other() -> None:
    torch.manual_seed(0)
    trunk, first, second = nn.Linear(4, 6), nn.Linear(3, 1), nn.Linear(3, 1)
    z = trunk(torch.randn(8, 4)).tanh()
    u, v = z.split(3, 1)
    losses = {"first": first(u).square().mean(), "second": (second(v) - 1).square().mean()}
    polytask.backward(losses, balancer=Fixed(plain=True), features=[u, v])
    found = trunk.weight.grad.clone()
    z = trunk(torch.zeros(1, 4)).tanh()
    torch.manual_seed(0)
    trunk, first, second = nn.Linear(4, 6), nn.Linear(3, 1), nn.Linear(3, 1)
    z = trunk(torch.randn(8, 4)).tanh()
    (first(z[:, :3]).square().mean() + (second(z[:, 3:]) - 1).square().mean()).backward()
    torch.testing.assert_close(found, trunk.weight.grad)


def test_a_detour_around_the_representation_is_refused() -> None:
    m = Pyramid()
    losses = m.losses()
    for features in ({"r": m.features["r"]}, {"p": m.features["p"], "r": m.features["r"]}):
        with pytest.raises(InputError, match=r"loss of task '(low|both)' reaches a parameter .* beside them"):
            polytask.backward(losses, balancer="upgrad", features=features)
    embedding = nn.Embedding(9, 4, dtype=torch.float64)
    z = m.one(embedding(torch.arange(9)))
    tied = {"word": (z[:, :4] @ embedding.weight.T).square().mean(), "other": z.square().mean()}
    with pytest.raises(InputError, match=r"loss of task 'word' reaches a parameter of shape \(9, 4\)"):
        polytask.backward(tied, balancer="upgrad", features=z)
    assert all(p.grad is None for p in [*m.parameters(), embedding.weight])

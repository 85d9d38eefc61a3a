"""Generated tasks that merging is tried on: each in a subspace of its own, one expert fine-tuned for each from a common start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

WIDTH, SUBSPACE, CLASSES = 32, 16, 6
MEANS, SPREAD, NOISE = 1.0, 0.8, 0.15
"""Standard deviations: of the classes' means and around them, both within the subspace; everywhere."""

SIZES = {"train": 600, "validation": 64, "test": 1000}
WARM_UP, RATE = 6, 2e-3


@dataclass(frozen=True)
class Split:
    """Inputs and labels of one task."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class World:
    """What all arms of one seed share.

    Attributes:
        net: the network's architecture; its heads are fixed and its own.
        heads: a linear head for each task.
        base: the state that experts started from.
        experts: their states, one a task.
        tasks: for each task its splits by name.
    """

    net: nn.Module
    heads: tuple[nn.Linear, ...]
    base: Mapping[str, Tensor]
    experts: tuple[Mapping[str, Tensor], ...]
    tasks: tuple[Mapping[str, Split], ...]

    @torch.no_grad()
    def probabilities(self, state: Mapping[str, Tensor], task: int, split: str) -> Tensor:
        """What a state of the network says of a task's inputs, shape (examples, classes)."""
        h: Tensor = functional_call(self.net, dict(state), (self.tasks[task][split].x,))
        p: Tensor = self.heads[task](h).softmax(-1)
        return p

    def accuracy(self, state: Mapping[str, Tensor], split: str) -> float:
        """The mean over tasks."""
        return sum(self.accuracy_of(state, t, split) for t in range(len(self.tasks))) / len(self.tasks)

    def accuracy_of(self, state: Mapping[str, Tensor], task: int, split: str) -> float:
        """On one task."""
        right = self.probabilities(state, task, split).argmax(-1) == self.tasks[task][split].y
        return float(right.double().mean())


@cache
def world(count: int, steps: int, seed: int) -> World:
    """Draw tasks, warm the network up on all of them, fix the heads, and fine-tune an expert for each task.

    Each task's classes lie around means in the span of a random orthonormal basis of half the input's width.

    Args:
        count: of tasks.
        steps: of Adam for each expert.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)
    tasks = tuple(_task(g) for _ in range(count))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, WIDTH))
    heads = tuple(nn.Linear(WIDTH, CLASSES) for _ in range(count))
    _fit(net, heads, tasks, range(count), WARM_UP, [*net.parameters(), *(p for h in heads for p in h.parameters())])
    base = {n: v.clone() for n, v in net.state_dict().items()}
    experts = []
    for t in range(count):
        net.load_state_dict(base)
        _fit(net, heads, tasks, [t], steps, list(net.parameters()))
        experts.append({n: v.clone() for n, v in net.state_dict().items()})
    return World(net, heads, base, tuple(experts), tasks)


def _task(g: torch.Generator) -> dict[str, Split]:
    basis = torch.linalg.qr(torch.randn(WIDTH, SUBSPACE, generator=g))[0]
    means = MEANS * torch.randn(CLASSES, SUBSPACE, generator=g)
    splits = {}
    for name, n in SIZES.items():
        y = torch.randint(CLASSES, (n,), generator=g)
        inside = means[y] + SPREAD * torch.randn(n, SUBSPACE, generator=g)
        splits[name] = Split(inside @ basis.T + NOISE * torch.randn(n, WIDTH, generator=g), y)
    return splits


def _fit(
    net: nn.Module,
    heads: tuple[nn.Linear, ...],
    tasks: tuple[Mapping[str, Split], ...],
    chosen: range | list[int],
    steps: int,
    parameters: list[nn.Parameter],
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for _ in range(steps):
        losses = [F.cross_entropy(heads[t](net(tasks[t]["train"].x)), tasks[t]["train"].y) for t in chosen]
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).mean())
        optimizer.step()

"""Generated tasks for low-rank experts on one frozen network, some of the experts bad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.merging.library import ExpertLibrary

WIDTH, HIDDEN, CLASSES, RANK, SCALE = 16, 32, 4, 4, 2.0
BASE_STEPS, STEPS, RATE = 60, 150, 1e-2
SIZES = {"base": 20, "experts": 150, "fit": 40, "validation": 40, "test": 400}
"""Examples of a task: the base and the experts are trained on data of their own, fusing and choosing have other data again."""

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class World:
    """What all arms of one seed share.

    Attributes:
        library: the base and the experts; ``task0`` is the first task's own, ``bad0`` a bad one of it.
        tasks: for each task its splits by name.
    """

    library: ExpertLibrary
    tasks: tuple[Mapping[str, Split], ...]

    @property
    def own(self) -> list[str]:
        """Each task's own expert."""
        return [f"task{t}" for t in range(len(self.tasks))]

    def together(self, split: str) -> Split:
        """One split of all tasks."""
        x, y = (torch.cat([task[split][i] for task in self.tasks]) for i in (0, 1))
        return x, y


@cache
def gaussian_world(tasks: int, bad: int, steps: int, seed: int) -> World:
    r"""Inputs around a mean of each task's own, labels by maps that have a part in common.

    .. math:: x \sim N(\mu_t, 0.8^2 I), \qquad y = \arg\max\, (0.6\, W + W_t)(x - \mu_t), \qquad \mu_t, W, W_t \text{ standard normal}

    Args:
        tasks: how many.
        bad: how many experts more, trained with nine labels of ten at random.
        steps: of Adam for each expert.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(CLASSES, WIDTH, generator=g)
    drawn = []
    for _ in range(tasks):
        mu, own = torch.randn(WIDTH, generator=g), torch.randn(CLASSES, WIDTH, generator=g)
        noise = {name: 0.8 * torch.randn(n, WIDTH, generator=g) for name, n in SIZES.items()}
        drawn.append({name: (mu + e, (e @ (0.6 * common + own).T).argmax(-1)) for name, e in noise.items()})
    return _trained(tuple(drawn), bad, steps, seed, g)


@cache
def subspace_world(tasks: int, steps: int, seed: int) -> World:
    """Inputs of mean zero, each task's in a subspace of its own, orthogonal to the others': where Arrow must find the way.

    Args:
        tasks: how many, in as many times four dimensions.
        steps: of Adam for each expert.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(4 * tasks, 4 * tasks, generator=g))[0]
    drawn = []
    for part in basis.split(4):
        own = torch.randn(CLASSES, 4, generator=g)
        z = {name: torch.randn(n, 4, generator=g) for name, n in SIZES.items()}
        drawn.append({name: (e @ part, (e @ own.T).argmax(-1)) for name, e in z.items()})
    return _trained(tuple(drawn), 0, steps, seed, g)


def _trained(tasks: tuple[Mapping[str, Split], ...], bad: int, steps: int, seed: int, g: torch.Generator) -> World:
    torch.manual_seed(seed)
    width = tasks[0]["base"][0].shape[1]
    base = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    x, y = (torch.cat([task["base"][i] for task in tasks]) for i in (0, 1))
    optimizer = torch.optim.Adam(base.parameters(), lr=RATE)
    for _ in range(BASE_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(base(x), y))
        optimizer.step()
    base.requires_grad_(False)
    states = {f"task{t}": _expert(base, *task["experts"], steps, g) for t, task in enumerate(tasks)}
    for b in range(bad):
        inputs, labels = tasks[b % len(tasks)]["experts"]
        wrong = torch.rand(len(labels), generator=g) < 0.9
        labels = torch.where(wrong, torch.randint(CLASSES, labels.shape, generator=g), labels)
        states[f"bad{b}"] = _expert(base, inputs, labels, steps, g)
    return World(ExpertLibrary.from_states(base, states, SCALE), tasks)


def _expert(base: nn.Module, x: Tensor, y: Tensor, steps: int, g: torch.Generator) -> dict[str, Tensor]:
    """LoRA on both layers, A as Kaiming has it and B zero."""
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    A = {n: (2 * torch.rand(RANK, m.in_features, generator=g) - 1) / m.in_features**0.5 for n, m in layers.items()}
    B = {n: torch.zeros(m.out_features, RANK) for n, m in layers.items()}
    trained = [t.requires_grad_(True) for t in (*A.values(), *B.values())]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    for _ in range(steps):
        updated = {f"{n}.weight": m.weight + SCALE * B[n] @ A[n] for n, m in layers.items()}
        loss = F.cross_entropy(torch.func.functional_call(base, updated, (x,)), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    named = {f"{n}.lora_A.weight": A[n] for n in layers} | {f"{n}.lora_B.weight": B[n] for n in layers}
    return {n: t.detach() for n, t in named.items()}

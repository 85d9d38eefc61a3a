"""A small agent that learns which weights pay: soft actor-critic, whose networks and memory belong to the balancer's state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import Vector

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
LOG_STD_RANGE = (-20.0, 2.0)


@dataclass(frozen=True)
class SoftActorCritic:
    r"""Soft actor-critic on K observed numbers, whose actions are K weights of mean 1.

    The actor draws :math:`u \sim \mathcal N(\mu(s), \sigma(s)^2)` and plays :math:`a = K\,\mathrm{softmax}(u)`; two critics learn

    .. math:: Q_j(s, a) \to r + \gamma \bigl(\min_j \bar Q_j(s', a') - \alpha \log \pi(a' | s')\bigr)

    where :math:`\log \pi` is the density of :math:`\tanh u`, as in IGBv2's code, and :math:`\bar Q` follows Q slowly; the actor ascends
    :math:`\min_j Q_j - \alpha \log \pi`, and :math:`\alpha` keeps the entropy at -K.

    Everything that is learnt stands in the dictionary made by :meth:`start`, in single precision on the host; networks are flat vectors.

    Args:
        tasks: K.
        hidden: widths of the two hidden layers of each network.
        lr: step size of the Adams that train actor, critics and temperature.
        discount: :math:`\gamma`.
        temperature: :math:`\alpha` at the start.
        follow: how much of the way to Q its slow copy goes at a time.
        memory: how many transitions are remembered.

    Source: Haarnoja et al., ICML 2018 (arXiv:1801.01290); with learnt temperature arXiv:1812.05905.
    """

    tasks: int
    hidden: Sequence[int] = (128, 128)
    lr: float = 3e-4
    discount: float = 0.99
    temperature: float = 0.2
    follow: float = 0.005
    memory: int = 10_000

    @property
    def _actor(self) -> _Shape:
        return _Shape(1, (self.tasks, *self.hidden, 2 * self.tasks))

    @property
    def _critics(self) -> _Shape:
        return _Shape(2, (2 * self.tasks, *self.hidden, 1))

    def start(self, rng: np.random.Generator) -> dict[str, Any]:
        """The state before anything is learnt, its networks drawn from the generator."""
        actor, critics = self._actor.draw(rng), self._critics.draw(rng)
        temperature = torch.tensor([math.log(self.temperature)], dtype=torch.float32)
        learnt = {"actor": actor, "critics": critics, "log_temperature": temperature}
        moments = {f"{name}_{m}": torch.zeros_like(x) for name, x in learnt.items() for m in ("mean", "square")}
        # one row a transition: s, a, s', r
        memory = torch.zeros(self.memory, 3 * self.tasks + 1, dtype=torch.float32)
        return {**learnt, **moments, "slow_critics": critics.clone(), "memory": memory, "remembered": 0, "lessons": 0}

    def act(self, state: dict[str, Any], s: Vector, rng: np.random.Generator) -> Vector:
        """Weights of mean 1, shape (tasks,), drawn for what is observed."""
        with torch.no_grad():
            seen = torch.as_tensor(s, dtype=torch.float32)[None]
            a, _ = self._play(self._actor.layers_of(state["actor"]), seen, rng)
        return np.asarray(a[0].double().numpy())

    def remember(self, state: dict[str, Any], s: Vector, a: Vector, after: Vector, reward: float) -> None:
        """Keep a transition, in the place of the oldest where memory is full."""
        state["memory"][state["remembered"] % self.memory] = torch.as_tensor(np.r_[s, a, after, reward])
        state["remembered"] += 1

    def learn(self, state: dict[str, Any], batch: int, rng: np.random.Generator) -> None:
        """One step of critics, actor, temperature and slow critics, on transitions drawn with replacement."""
        drawn = torch.as_tensor(rng.integers(min(state["remembered"], self.memory), size=batch))
        s, a, after, reward = state["memory"][drawn].split([self.tasks, self.tasks, self.tasks, 1], 1)
        state["lessons"] += 1
        alpha = float(state["log_temperature"].exp())
        actor, critics = self._actor.layers_of(state["actor"]), self._critics.layers_of(state["critics"])
        with torch.no_grad():
            a_next, density = self._play(actor, after, rng)
            worth = _judge(self._critics.layers_of(state["slow_critics"]), after, a_next).amin(0) - alpha * density
            target = reward + self.discount * worth
        missed = (_judge(_learning(critics), s, a) - target).square().mean(1).sum()
        self._descend(state, "critics", torch.autograd.grad(missed, critics))
        for layer in critics:
            layer.requires_grad_(False)
        played, density = self._play(_learning(actor), s, rng)
        loss = (alpha * density - _judge(critics, s, played).amin(0)).mean()
        self._descend(state, "actor", torch.autograd.grad(loss, actor))
        self._descend(state, "log_temperature", [(self.tasks - density.detach()).mean()])
        state["slow_critics"].lerp_(state["critics"], self.follow)

    def _play(self, actor: list[Tensor], s: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Actions drawn, shape (batch, tasks), and the logarithms of their densities, shape (batch, 1)."""
        mu, log_std = _evaluate(actor, s)[0].chunk(2, 1)
        log_std = log_std.clamp(*LOG_STD_RANGE)
        noise = torch.as_tensor(rng.standard_normal(mu.shape, dtype=np.float32))
        u = mu + log_std.exp() * noise
        normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        tanh = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
        return self.tasks * torch.softmax(u, 1), (normal - tanh).sum(1, keepdim=True)

    def _descend(self, state: dict[str, Any], name: str, gradients: Sequence[Tensor]) -> None:
        g = torch.cat([part.flatten() for part in gradients])
        t, m, v = state["lessons"], state[f"{name}_mean"], state[f"{name}_square"]
        m.lerp_(g, 1 - BETA1)
        v.lerp_(g.square_(), 1 - BETA2)
        root = v.sqrt().mul_((1 - BETA2**t) ** -0.5).add_(EPSILON)
        state[name].addcdiv_(m, root, value=-self.lr / (1 - BETA1**t))


@dataclass(frozen=True)
class _Shape:
    """n networks side by side in one flat vector: of each layer the weights (n, inputs, outputs), then the biases (n, 1, outputs)."""

    n: int
    widths: tuple[int, ...]

    @property
    def _layers(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.widths))

    def draw(self, rng: np.random.Generator) -> Float[Tensor, " parameters"]:
        """Uniform between plus and minus one over the root of each layer's inputs."""
        parts = [rng.uniform(-1, 1, self.n * (i + 1) * o) / math.sqrt(i) for i, o in self._layers]
        return torch.as_tensor(np.concatenate(parts), dtype=torch.float32)

    def layers_of(self, flat: Float[Tensor, " parameters"]) -> list[Tensor]:
        """Views of weights and biases in turn."""
        shapes = [shape for i, o in self._layers for shape in ((self.n, i, o), (self.n, 1, o))]
        parts = torch.split(flat.detach(), [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _learning(layers: list[Tensor]) -> list[Tensor]:
    return [layer.requires_grad_() for layer in layers]


def _evaluate(layers: list[Tensor], x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "n batch outputs"]:
    """The outputs of networks side by side, with ReLU between their layers."""
    h = x.expand(len(layers[0]), *x.shape)
    for number, (W, b) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        h = torch.baddbmm(b, h.relu() if number else h, W)
    return h


def _judge(critics: list[Tensor], s: Tensor, a: Tensor) -> Float[Tensor, "two batch 1"]:
    return _evaluate(critics, torch.cat([s, a], 1))

"""Fitting what fuses experts on a little labelled data, the experts frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging.bayesian_search import search
from polytask.merging.fusion import logits_of
from polytask.merging.library import ExpertLibrary
from polytask.merging.routed import forcing, routed_layers
from polytask.merging.routed_model import weight_name
from polytask.merging.routers import Constant

Batches = Sequence[tuple[Any, Tensor]]
"""(inputs, labels); inputs are a tensor, a tuple of positional arguments or a dict of named ones."""
Loss = Callable[[Tensor, Tensor], Tensor]


def fit_ensemble(
    probabilities: Float[Tensor, "experts examples classes"], labels: Int[Tensor, " examples"], steps: int = 200
) -> Float[Tensor, " experts"]:
    r"""The weights of an ensemble by maximum likelihood, from uniform ones on.

    .. math:: \min_{w \in \Delta}\ -\sum_n \log \sum_k w_k p_{kn}, \qquad w_k \leftarrow \frac1N \sum_n \frac{w_k p_{kn}}{\sum_j w_j p_{jn}}

    The problem is convex, and each step of this expectation-maximization lowers the loss.

    Args:
        probabilities: of every expert for every example, computed once.
        labels: which class is true.
        steps: of expectation-maximization.
    """
    p = probabilities[:, torch.arange(len(labels)), labels].double().clamp_min(torch.finfo(torch.float32).tiny)
    w = torch.full((len(p),), 1 / len(p), dtype=torch.float64)
    for _ in range(steps):
        w = (w[:, None] * p / (w @ p)).mean(1)
    return w.to(probabilities.dtype)


def fit_coefficients(
    library: ExpertLibrary,
    batches: Batches,
    *,
    per: Literal["model", "layer"] = "layer",
    simplex: bool = False,
    start: Float[Tensor, " experts"] | None = None,
    steps: int = 100,
    learning_rate: float = 0.05,
    noise: float = 1e-3,
    seed: int = 0,
    loss: Loss = F.cross_entropy,
) -> Float[Tensor, " experts"] | dict[str, Float[Tensor, " experts"]]:
    r"""The weights of :math:`W_0 + \sum_k w_k B_k A_k` by gradient descent on labelled data; for one task's data, that task's weights.

    Args:
        library: the experts.
        batches: not those that the experts were trained on, nor those that the result is judged by.
        per: one weight an expert for the whole ``model``, or one for each ``layer``.
        simplex: keep the weights positive and summing to 1 by a softmax.
        start: the weights begun with, such as a task's own expert alone; 1 / K when omitted. Not with ``simplex``.
        steps: batches seen by Adam.
        learning_rate: of Adam.
        noise: uniform noise that the start gets, up to this size.
        seed: of the noise.
        loss: of (logits, labels).

    Returns:
        The weights, as :func:`~polytask.merging.fusion.merge_experts` takes them.

    Raises:
        InputError: no batch, or both a start and the simplex.
    """
    if simplex and start is not None:
        raise InputError("weights on the simplex start from uniform ones")
    K = len(library.names)
    model = library.routed(lambda _, low: Constant(torch.zeros(len(low.A)))).requires_grad_(False).eval()
    names = {layer: weight_name(model, layer) for layer in routed_layers(model)}
    first = torch.zeros(K) if simplex else torch.full((K,), 1 / K) if start is None else start.detach()
    g = torch.Generator().manual_seed(seed)
    shape = (len(names) if per == "layer" else 1, K)
    a = (first + noise * (2 * torch.rand(shape, generator=g) - 1)).requires_grad_(True)

    def weights() -> dict[str, Tensor]:
        w = a.softmax(-1) if simplex else a
        return dict(zip(names, w.expand(len(names), K), strict=True))

    def step(inputs: Any, labels: Tensor) -> Tensor:
        with forcing(model, weights()):
            return loss(answer(model, inputs), labels)

    _descend([a], step, batches, steps, learning_rate)
    found = {names[n]: w.detach().clone() for n, w in weights().items()}
    return found if per == "layer" else next(iter(found.values()))


def search_coefficients(
    library: ExpertLibrary,
    loss: Callable[[nn.Module], float],
    *,
    bound: float = 1.5,
    penalty: float = 0.05,
    budget: int = 60,
    how: Literal["gp", "random", "grid"] = "gp",
    seed: int = 0,
) -> Float[Tensor, " experts"]:
    r"""The weights of :math:`W_0 + \sum_k w_k B_k A_k` without gradients, for losses that have none (LoraHub, arXiv:2307.13269).

    .. math:: \min_{|w_k| \le b}\ L(w) + \frac{\alpha}{K} \sum_k |w_k|

    Args:
        library: the experts.
        loss: L of a merged model, lower is better.
        bound: b.
        penalty: :math:`\alpha`.
        budget: how many merges are tried, the base and the uniform one first.
        how: see :func:`~polytask.merging.bayesian_search.search`.
        seed: of the search.
    """
    K = len(library.names)

    def value(z: Any) -> float:
        w = torch.as_tensor(z, dtype=torch.float32)
        return -loss(library.merged(w)) - penalty * float(w.abs().mean())

    found = search(value, [(-bound, bound)] * K, budget=budget, how=how, start=[[0.0] * K, [1 / K] * K], seed=seed)
    return torch.tensor(found.best.z, dtype=torch.float32)


def train_router(
    model: nn.Module, batches: Batches, *, steps: int = 200, learning_rate: float = 0.01, loss: Loss = F.cross_entropy
) -> nn.Module:
    """Train the routers of a model, base and experts frozen.

    Args:
        model: with routed layers, as :func:`~polytask.merging.fusion.route_experts` makes it; it is changed in its place.
        batches: see :func:`fit_coefficients`.
        steps: batches seen by Adam.
        learning_rate: of Adam.
        loss: of (logits, labels).

    Raises:
        InputError: no batch, or routers without anything to train.
    """
    trained = [p for layer in routed_layers(model).values() for p in layer.router.parameters()]
    if not trained:
        raise InputError("these routers have nothing to train: make linear ones")
    _descend(trained, lambda inputs, labels: loss(answer(model, inputs), labels), batches, steps, learning_rate)
    return model


@torch.no_grad()
def expert_probabilities(
    library: ExpertLibrary, batches: Batches
) -> tuple[Float[Tensor, "experts examples classes"], Int[Tensor, " examples"]]:
    """What each expert alone predicts, and the labels: all that ensembles and the choice of experts need."""
    model = library.routed(lambda _, low: Constant(torch.zeros(len(low.A)))).eval()
    found = []
    for name in library.names:
        with forcing(model, name):
            found.append(torch.cat([answer(model, inputs).softmax(-1) for inputs, _ in batches]))
    return torch.stack(found), torch.cat([labels for _, labels in batches])


def expert_losses(library: ExpertLibrary, batches_by_task: Mapping[str, Batches]) -> Float[Tensor, "experts tasks"]:
    """The negative log-likelihood of every expert on every task, for :func:`~polytask.merging.greedy.greedy_coverage`."""
    columns = []
    for batches in batches_by_task.values():
        p, labels = expert_probabilities(library, batches)
        own = p[:, torch.arange(len(labels)), labels]
        columns.append(-own.clamp_min(torch.finfo(own.dtype).tiny).log().mean(1))
    return torch.stack(columns, 1)


def answer(model: nn.Module, inputs: Any) -> Tensor:
    """The logits of a model for inputs of whatever form."""
    if isinstance(inputs, dict):
        return logits_of(model(**inputs))
    return logits_of(model(*inputs) if isinstance(inputs, tuple | list) else model(inputs))


def _descend(
    parameters: Sequence[Tensor],
    step: Callable[[Any, Tensor], Tensor],
    batches: Batches,
    steps: int,
    learning_rate: float,
) -> None:
    if not batches:
        raise InputError("there is no batch to fit on")
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for inputs, labels in islice(cycle(batches), steps):
        gradients = torch.autograd.grad(step(inputs, labels), list(parameters))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()

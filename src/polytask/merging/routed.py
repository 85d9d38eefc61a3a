"""Linear layers with low-rank experts beside them, and the router that weighs them for each input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging.routers import Router

Mix = Literal["outputs", "parameters"]


@dataclass(frozen=True)
class LowRank:
    r"""The updates :math:`\Delta_t = B_t A_t` of one weight by several experts, scales included.

    Args:
        A: shape (experts, rank, inputs).
        B: shape (experts, outputs, rank).
        C: the updates of the layer's bias, shape (experts, outputs), where experts have any.
    """

    A: Float[Tensor, "experts rank inputs"]
    B: Float[Tensor, "experts outputs rank"]
    C: Float[Tensor, "experts outputs"] | None = None

    @classmethod
    def stack(cls, pairs: Sequence[tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]]) -> Self:
        """Experts of whatever ranks in one; those of lower rank are filled up with zeros, which changes nothing."""
        r = max(A.shape[0] for A, _ in pairs)
        padded = [
            (F.pad(A, (0, 0, 0, r - A.shape[0])), F.pad(B, (0, r - B.shape[1])))
            for A, B in ((a.detach(), b.detach()) for a, b in pairs)
        ]
        return cls(torch.stack([A for A, _ in padded]), torch.stack([B for _, B in padded]))

    def delta(self, w: Float[Tensor, " experts"]) -> Float[Tensor, "outputs inputs"]:
        r""":math:`\sum_t w_t B_t A_t`."""
        return (self.B * w[:, None, None]).transpose(0, 1).flatten(1) @ self.A.flatten(0, 1)

    def mixed(self, w: Float[Tensor, " experts"]) -> Float[Tensor, "outputs inputs"]:
        r""":math:`\bigl(\sum_t w_t B_t\bigr) \bigl(\sum_t w_t A_t\bigr)`."""
        return torch.einsum("t,tor->or", w, self.B) @ torch.einsum("t,tri->ri", w, self.A)


class RoutedLinear(nn.Module):
    r"""A linear layer and its experts, weighed by a router.

    .. math:: y = W x + b + \sum_t w_t(x)\, (B_t A_t x + c_t)

    Its weight and bias keep their names, so that a routed model's state dict is the plain one's and some more.

    Args:
        linear: W and b.
        A: shape (experts, rank, inputs); ``LowRank.stack`` makes one tensor of several ranks.
        B: shape (experts, outputs, rank), the scale of the experts included.
        router: gives w.
        mix: ``outputs`` is the formula above; ``parameters`` mixes A and B each for itself, with cross terms
            :math:`w_s w_t B_s A_t`, which is cheaper where the weights are the same for all inputs.
        C: :math:`c_t`, shape (experts, outputs); zero when omitted.

    Raises:
        InputError: shapes that do not fit.

    Cost: (inputs + outputs) x rank x experts multiplications a token beside the layer's own; where a sample has one expert for all of
    its tokens, (inputs + outputs) x rank.
    """

    forced: Tensor | None = None
    """Weights that take the router's place, shape (experts,) or (batch, experts); see :func:`forcing`."""

    mask: Tensor | None = None
    """Which tokens are no padding, shape (batch, tokens); see :func:`unpadded`."""

    watcher: Callable[[Tensor], None] | None = None
    """Is shown the weights; see :func:`recording`."""

    def __init__(
        self,
        linear: nn.Linear,
        A: Float[Tensor, "experts rank inputs"],
        B: Float[Tensor, "experts outputs rank"],
        router: Router,
        mix: Mix = "outputs",
        C: Float[Tensor, "experts outputs"] | None = None,
    ) -> None:
        super().__init__()
        fits = A.shape[0] == B.shape[0] and A.shape[1] == B.shape[2] and (C is None or C.shape == B.shape[:2])
        if not fits or (B.shape[1], A.shape[2]) != tuple(linear.weight.shape):
            raise InputError(
                f"experts of {list(B.shape)} x {list(A.shape)} do not fit a {list(linear.weight.shape)} layer"
            )
        if mix not in ("outputs", "parameters"):
            raise InputError(f"experts are mixed by their 'outputs' or their 'parameters', not by {mix!r}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.A, self.B = (nn.Parameter(t.detach().to(linear.weight), requires_grad=False) for t in (A, B))
        self.C = None if C is None else nn.Parameter(C.detach().to(linear.weight), requires_grad=False)
        self.router = router.to(linear.weight.device)
        self.mix: Mix = mix

    def forward(self, x: Float[Tensor, "batch ... inputs"]) -> Float[Tensor, "batch ... outputs"]:
        w = self.weights(x)
        y = F.linear(x, self.weight, self.bias)
        if self.C is not None:
            y = y + w @ self.C
        if self.router.one_a_sample and self.forced is None and x.ndim > 2:
            chosen = w.reshape(len(x), -1).argmax(-1)
            h = torch.bmm(x.flatten(1, -2), self.A[chosen].mT)
            return y + torch.bmm(h, self.B[chosen].mT).view(y.shape)
        if self.mix == "parameters" and w.ndim == 1:
            A, B = torch.einsum("t,tri->ri", w, self.A), torch.einsum("t,tor->or", w, self.B)
            return y + F.linear(F.linear(x, A), B)
        h = F.linear(x, self.A.flatten(0, 1)).view(*x.shape[:-1], *self.A.shape[:2])
        if self.mix == "parameters":
            h = (w[..., None] * h).sum(-2, keepdim=True)
        return y + F.linear((w[..., None] * h).flatten(-2), self.B.transpose(0, 1).flatten(1))

    def weights(self, x: Float[Tensor, "batch ... inputs"]) -> Float[Tensor, "... experts"]:
        """The weights of the experts for an input, with axes to be spread over its tokens."""
        w = self.router(x, self.mask) if self.forced is None else self.forced.to(x.device, x.dtype)
        if self.watcher is not None:
            self.watcher(w)
        while 1 < w.ndim < x.ndim:
            w = w.unsqueeze(-2)
        return w


@dataclass
class Record:
    """What routed layers chose while somebody watched.

    Attributes:
        experts: names, in the order of the weights.
        weights: for each layer and call the weights.
    """

    experts: tuple[str, ...]
    weights: dict[str, list[Tensor]] = field(default_factory=dict)

    def chosen(self, layer: str) -> Tensor:
        """The index of the heaviest expert, for each sample or token in the order seen."""
        return torch.cat([w.reshape(-1, w.shape[-1]).argmax(-1) for w in self.weights[layer]])

    def shares(self, layer: str) -> dict[str, float]:
        """For each expert, in how many samples or tokens it was the heaviest."""
        counts = self.chosen(layer).bincount(minlength=len(self.experts)).double()
        return dict(zip(self.experts, (counts / counts.sum()).tolist(), strict=True))

    def accuracy(self, own: str) -> float:
        """Over all layers, in how many samples or tokens an expert named was the heaviest."""
        return sum(self.shares(layer)[own] for layer in self.weights) / len(self.weights)


@contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    """Watch which experts are chosen.

    Example:
        >>> from polytask.merging.routers import Prototypes
        >>> A, B = torch.zeros(2, 1, 2), torch.zeros(2, 3, 1)
        >>> layer = RoutedLinear(nn.Linear(2, 3), A, B, Prototypes(torch.eye(2)))
        >>> with recording(layer) as record:
        ...     _ = layer(torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.2, 1.0], [2.0, 1.0]]))
        >>> record.accuracy("0")
        0.75
    """
    record = Record(expert_names(model))
    with _set(model, "watcher", {n: _into(record.weights.setdefault(n, [])) for n in routed_layers(model)}):
        yield record


@contextmanager
def forcing(model: nn.Module, weights: str | Tensor | Mapping[str, Tensor] | None) -> Iterator[None]:
    """Decide in the routers' place.

    Args:
        model: with routed layers.
        weights: the name of an expert, for an oracle; None for the base alone; indices of experts, integers of shape (batch,); or
            weights, shape (experts,) or (batch, experts), one tensor or one a layer. Gradients reach them.

    Raises:
        InputError: no expert, or no layer, of that name.
    """
    names = expert_names(model)
    layers = routed_layers(model)
    if isinstance(weights, str):
        if weights not in names:
            raise InputError(f"there is no expert {weights!r}; there are {', '.join(names)}")
        weights = F.one_hot(torch.tensor(names.index(weights)), len(names)).float()
    elif weights is None:
        weights = torch.zeros(len(names))
    if isinstance(weights, Tensor):
        w = weights if weights.is_floating_point() else F.one_hot(weights, len(names)).float()
        weights = dict.fromkeys(layers, w)
    unknown = [n for n in weights if n not in layers]
    if unknown:
        raise InputError(f"there is no routed layer {unknown[0]!r}; there are {', '.join(layers)}")
    with _set(model, "forced", weights):
        yield


@contextmanager
def unpadded(model: nn.Module, mask: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
    """Tell the routers which tokens are no padding: means leave the others out."""
    with _set(model, "mask", dict.fromkeys(routed_layers(model), mask.bool())):
        yield


def routed_layers(model: nn.Module) -> dict[str, RoutedLinear]:
    """The routed layers by name, in the model's order.

    Raises:
        InputError: there is none.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    if not found:
        raise InputError("the model has no routed layer: add experts to it first")
    return found


def expert_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the experts, as they were given when they were added."""
    names: tuple[str, ...] = getattr(model, "expert_names", ())
    return names or tuple(str(i) for i in range(len(next(iter(routed_layers(model).values())).A)))


@contextmanager
def _set(model: nn.Module, attribute: str, values: Mapping[str, object]) -> Iterator[None]:
    layers = routed_layers(model)
    before = {n: getattr(layers[n], attribute) for n in values}
    try:
        for n, value in values.items():
            setattr(layers[n], attribute, value)
        yield
    finally:
        for n, value in before.items():
            setattr(layers[n], attribute, value)


def _into(weights: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda w: weights.append(w.detach().cpu())

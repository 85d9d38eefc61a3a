"""One system of several experts: their outputs mixed, their weights mixed, or weights that depend on the input (arXiv:2603.03535)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.merging.arrow import arrow_prototypes
from polytask.merging.library import Coefficients, ExpertLibrary, Space
from polytask.merging.routed import LowRank, Mix, RoutedLinear, forcing
from polytask.merging.routers import Arrow, Constant, LinearRouter, Router

RouterName = Literal["arrow", "linear"]


class Ensemble(nn.Module):
    r"""The experts' predictions mixed; K forward passes.

    .. math:: \log \sum_k w_k\, p_k(y \mid x) \quad (\text{probabilities}), \qquad \sum_k w_k\, z_k(x) \quad (\text{logits})

    Args:
        library: the experts.
        weights: w, shape (experts,), on the simplex for probabilities; uniform when omitted.
        space: what is mixed.

    Raises:
        InputError: weights off the simplex.
    """

    weights: Tensor

    def __init__(
        self,
        library: ExpertLibrary,
        weights: Float[Tensor, " experts"] | None = None,
        space: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        super().__init__()
        w = next(iter(library.by_layer(weights).values()))
        if space == "probabilities" and (bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-5):
            raise InputError("probabilities are mixed by weights that are not negative and sum to 1")
        self.register_buffer("weights", w.detach().clone())
        self.names, self.space = library.names, space
        self.model = library.routed(lambda _, low: Constant(torch.zeros(len(low.A))))

    def forward(self, *inputs: Any, **named: Any) -> Float[Tensor, "... classes"]:
        """Log-probabilities, or logits."""
        mixed: list[Tensor] = []
        for name, w in zip(self.names, self.weights, strict=True):
            if w:
                with forcing(self.model, name):
                    z = logits_of(self.model(*inputs, **named))
                mixed.append(w.log() + z.log_softmax(-1) if self.space == "probabilities" else w * z)
        several = torch.stack(mixed)
        return several.logsumexp(0) if self.space == "probabilities" else several.sum(0)


def ensemble(
    library: ExpertLibrary,
    weights: Float[Tensor, " experts"] | None = None,
    space: Literal["probabilities", "logits"] = "probabilities",
) -> Ensemble:
    """Mix the experts' outputs; see :class:`Ensemble`."""
    return Ensemble(library, weights, space)


def merge_experts(library: ExpertLibrary, weights: Coefficients = None, space: Space = "delta") -> nn.Module:
    """Mix the experts' weights; see :meth:`~polytask.merging.library.ExpertLibrary.merged`."""
    return library.merged(weights, space)


def route_experts(
    library: ExpertLibrary, router: RouterName = "arrow", mix: Mix = "outputs", **options: Any
) -> nn.Module:
    """Weigh the experts for each input.

    Args:
        library: the experts.
        router: ``arrow`` needs no data; ``linear`` is the uniform merge until it is trained, see
            :func:`~polytask.merging.coefficients.train_router`.
        mix: see :class:`~polytask.merging.routed.RoutedLinear`.
        options: ``temperature``, ``top_k``, ``per``.

    Raises:
        InputError: no such router.
    """
    routers: Mapping[str, Callable[[str, LowRank], Router]] = {
        "arrow": lambda _, low: Arrow(arrow_prototypes(low), **options),
        "linear": lambda _, low: LinearRouter.zeros(len(low.A), low.A.shape[2], **options).to(low.A.dtype),
    }
    if router not in routers:
        raise InputError(f"there is no router {router!r}; there are {', '.join(routers)}")
    return library.routed(routers[router], mix)


@dataclass(frozen=True)
class Fused:
    """A way of fusing experts, what it is worth and what it costs.

    Attributes:
        name: of the way.
        metric: as measured.
        forward: multiplications of a forward pass through the linear layers, in those of the base.
        parameters: numbers to be kept beside the base's.
    """

    name: str
    metric: float
    forward: float
    parameters: int


def fusion_report(
    library: ExpertLibrary, systems: Mapping[str, nn.Module], metric: Callable[[nn.Module], float]
) -> list[Fused]:
    """The table of trade-offs.

    Args:
        library: the experts.
        systems: models made of them, by name.
        metric: is called with each.
    """
    base = sum(p.numel() for p in library.base.state_dict().values())
    rows = []
    for name, system in systems.items():
        held = system.model if isinstance(system, Ensemble) else system
        more = sum(p.numel() for p in held.state_dict().values()) - base
        rows.append(Fused(name, metric(system), forward_multiplier(system), more))
    return rows


def forward_multiplier(system: nn.Module) -> float:
    """Multiplications of a forward pass through the linear layers, in those of the layers without experts.

    Of experts those count that get a weight; where each token has its own, :class:`~polytask.merging.routed.RoutedLinear` computes the
    others as well.
    """
    if isinstance(system, Ensemble):
        return float((system.weights != 0).sum())
    linear = [m for m in system.modules() if isinstance(m, nn.Linear | RoutedLinear)]
    own = sum(m.weight.numel() for m in linear)
    more = sum(_extra(m) for m in linear if isinstance(m, RoutedLinear))
    return 1 + more / own


def _extra(layer: RoutedLinear) -> int:
    """Multiplications a token of the experts that are used, and of the router."""
    K, r, width = layer.A.shape
    used = 1 if layer.router.one_a_sample else layer.router.options.get("top_k") or K
    router: int = sum(t.numel() for t in layer.router.state_dict().values() if t.ndim > 1)
    found: int = min(used, K) * r * (width + layer.out_features) + router
    return found


def logits_of(output: Any) -> Tensor:
    """A model's logits; transformers' models wrap them."""
    logits: Tensor = getattr(output, "logits", output)
    return logits

"""SMILE: a base with low-rank experts, each token sent where its directions lie (Tang et al., 2024, arXiv:2408.10174)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from polytask.errors import InputError
from polytask.merging.base import as_patterns, in_range
from polytask.merging.matching import skipped
from polytask.merging.routed import LowRank
from polytask.merging.routed_model import add_experts
from polytask.merging.routers import Subspaces
from polytask.merging.routing import Routing
from polytask.merging.spectral import leading_triplets
from polytask.registry import register


@register(
    "smile",
    family="merging",
    paper="arXiv:2408.10174",
    needs="base",
    aliases=("smile_upscaling", "SMILE"),
)
class SMILE(Routing):
    r"""Put each expert's leading singular directions beside the base's linear layers, and send every token where its inputs lie.

    .. math:: y = W_0 x + b_0 + \sum_t w_t(x)\, \bigl(U_t \Sigma_t V_t^\top x + b_t - b_0\bigr), \qquad
        w(x) = \operatorname{softmax}_{\text{top } K} \bigl\lVert (V_t)_{k_{gate}}^\top x \bigr\rVert_2

    with the k leading singular triplets :math:`U_t, \Sigma_t, V_t` of :math:`\tau_t = W_t - W_0`, and the :math:`k_{gate}` leading columns
    of :math:`V_t`. Every layer and token chooses for itself; nothing is trained and no data are looked at. Layers that no expert changed
    stay as they are, and everything but linear layers stays the base's.

    Args:
        rank: k; 0 keeps all directions. The authors try 4 to 128 for CLIP.
        gate: :math:`k_{gate}`, tried from 1 up; 16 with k = 32 in their examples.
        top_k: K.
        layers: patterns of the weights that get experts.

    Cost: a decomposition a layer and expert. A token costs T (gate x inputs + rank (inputs + outputs)) multiplications a layer more, with
    all experts computed; the experts hold as many numbers.
    """

    statistic = None
    static = "task_arithmetic"
    static_options: ClassVar[Mapping[str, Any]] = {"scale": 0.0}
    """Experts are added to the base itself."""

    def __init__(self, *, rank: int = 32, gate: int = 16, top_k: int = 1, layers: str | Sequence[str] = "*") -> None:
        in_range(rank, "the rank of smile", 0, float("inf"))
        in_range(gate, "the gate of smile", 1, float("inf"))
        in_range(top_k, "top_k of smile", 1, float("inf"))
        self.rank, self.gate, self.top_k, self.layers = int(rank), int(gate), int(top_k), as_patterns(layers)

    @torch.no_grad()
    def route(
        self,
        model: nn.Module,
        experts: Mapping[str, Mapping[str, Tensor]],
        statistics: Sequence[Mapping[str, Tensor]] = (),  # noqa: ARG002
    ) -> nn.Module:
        """Add experts to the base; see :func:`route_by_subspaces`."""
        base = model.state_dict()
        chosen = [n for n in linear_weights(model) if skipped(n, self.layers) and all(n in e for e in experts.values())]
        low: dict[str, LowRank] = {}
        gates: dict[str, Tensor] = {}
        for name in chosen:
            D = [change(label, name, state, base[name]) for label, state in experts.items()]
            if not any(bool(tau.any()) for tau in D):
                continue
            k = min(self.rank or min(D[0].shape), *D[0].shape)
            found = [leading_triplets(tau, max(k, min(self.gate, *tau.shape))) for tau in D]
            factors = LowRank.stack([(Vh[:k], U[:, :k] * s[:k]) for U, s, Vh in found])
            gates[name] = pad_sequence([Vh[: self.gate] for _, _, Vh in found], batch_first=True)
            bias = f"{name.removesuffix('weight')}bias"
            moved = bias in base and all(bias in e for e in experts.values())
            C = torch.stack([change(label, bias, e, base[bias]) for label, e in experts.items()]) if moved else None
            low[name] = LowRank(factors.A, factors.B, C)
        if not low:
            raise InputError(
                f"no linear layer that fits {', '.join(self.layers)} differs from the base's: none gets experts"
            )
        return add_experts(
            model, list(experts), low, lambda name, _: Subspaces(gates[name].to(base[name].dtype), self.top_k)
        )


def route_by_subspaces(
    model: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rank: int = 32,
    gate: int = 16,
    top_k: int = 1,
    layers: str | Sequence[str] = "*",
) -> nn.Module:
    """Add to a base the leading directions of the models that were fine-tuned from it, and routers that need no data (SMILE).

    ``forcing(model, "digits")`` makes the choice in the routers' place, ``forcing(model, None)`` runs the base alone, and
    ``recording(model)`` watches which expert is chosen.

    Args:
        model: holds the base's weights; its linear layers are replaced in place.
        experts: the fine-tuned state dicts by name; layers that one of them has not, such as a head of its own, get no experts.
        rank: of the experts; 0 keeps all directions.
        gate: directions of each expert by which tokens are sent.
        top_k: how many experts share a token.
        layers: patterns of the weights that get experts.

    Returns:
        The model itself.

    Raises:
        InputError: weights that do not fit the model; no layer that could get experts.
    """
    return SMILE(rank=rank, gate=gate, top_k=top_k, layers=layers).route(model, experts)


def linear_weights(model: nn.Module) -> list[str]:
    """The names of the weights of linear layers, those within attention included."""
    found = []
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Linear):
            found.append(f"{name}.weight")
        elif name and isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(f"{name}.in_proj_weight")
    return found


def change(label: str, name: str, state: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """What an expert changed in a tensor, float32 or wider.

    Raises:
        InputError: it has another shape there.
    """
    if state[name].shape != base.shape:
        raise InputError(
            f"{label} has no tensor {name} of shape {list(base.shape)}: leave that layer out, it may be a task head"
        )
    wide = torch.promote_types(base.dtype, torch.float32)
    return state[name].to("cpu", wide) - base.to("cpu", wide)

"""ESM++: a merged model with low-rank experts for what merging lost, one chosen by prototypes (Li et al. 2026, arXiv:2606.19164)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.merging.base import as_patterns, in_range
from polytask.merging.esd import esd
from polytask.merging.matching import skipped
from polytask.merging.moments import gramian, input_mean
from polytask.merging.routed import LowRank
from polytask.merging.routed_model import add_experts
from polytask.merging.routers import Prototypes
from polytask.merging.routing import Routing
from polytask.registry import register


@register(
    "esm_pp",
    family="merging",
    paper="arXiv:2606.19164",
    needs="statistics",
    aliases=("esm_plus_plus",),
)
class ESMPP(Routing):
    r"""Give each layer of a merged model the essential directions of what it lacks of each expert, and send each sample to one expert.

    .. math:: y = W_m x + b + B_e A_e x, \qquad W_t - W_m \approx B_t A_t, \qquad e = \arg\max_t \cos(\bar x, p_t)

    with :math:`B_t = U_t` and :math:`A_t = U_t^\top (W_t - W_m)` from :func:`~polytask.merging.esd.esd`, the mean :math:`\bar x` of the
    sample's own inputs to the layer, and the prototype :math:`p_t`, the mean input of the layer in expert t. Each sample and layer
    chooses for itself; nothing is trained. Biases and norms stay the merged model's.

    Args:
        rank: of the experts; 0 takes the layer's outputs divided by their number. The release uses 32 for ViT and 8 for RoBERTa.
        layers: patterns of the weights that get experts; the release takes ``*in_proj_weight`` and ``*c_fc.weight`` of a ViT, and
            every linear layer of a RoBERTa.

    Cost: a decomposition a layer and expert. A sample costs T x inputs multiplications a layer more to route, a token 2 T rank (inputs +
    outputs); routers hold T x inputs numbers a layer.
    """

    statistic = "gramian"
    static = "esm"

    def __init__(self, *, rank: int = 32, layers: str | Sequence[str] = "*") -> None:
        in_range(rank, "the rank of esm_pp", 0, float("inf"))
        self.rank, self.layers = int(rank), as_patterns(layers)

    @torch.no_grad()
    def route(
        self,
        model: nn.Module,
        experts: Mapping[str, Mapping[str, Tensor]],
        statistics: Sequence[Mapping[str, Tensor]],
    ) -> nn.Module:
        """Add experts to a merged model; see :func:`route_by_prototypes`."""
        if len(statistics) != len(experts):
            raise InputError(
                f"esm_pp needs a statistic of each of the {len(experts)} experts, and {len(statistics)} were given"
            )
        merged = model.state_dict()
        chosen = [n for n in merged if skipped(n, self.layers) and all(n in s for s in statistics)]
        if not chosen:
            raise InputError(f"no weight that statistics are of fits {', '.join(self.layers)}: no layer gets experts")
        low: dict[str, LowRank] = {}
        prototypes: dict[str, Tensor] = {}
        for name in chosen:
            pairs = []
            r = self.rank or max(1, len(merged[name]) // len(experts))
            for (label, state), S in zip(experts.items(), statistics, strict=True):
                residual = _residual(name, label, state, merged[name])
                _, B, A = esd(residual, gramian(S[name]), min(r, *residual.shape))
                pairs.append((A, B))
            low[name] = LowRank.stack(pairs)
            prototypes[name] = torch.stack([input_mean(s[name]) for s in statistics])
        return add_experts(
            model, list(experts), low, lambda name, _: Prototypes(prototypes[name].to(merged[name].dtype))
        )


def route_by_prototypes(
    model: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    statistics: Sequence[Mapping[str, Tensor]],
    *,
    rank: int = 32,
    layers: str | Sequence[str] = "*",
) -> nn.Module:
    """Add to a merged model low-rank experts for what it lacks of the models it was merged from (ESM++).

    ``forcing(model, "digits")`` makes the choice in the routers' place, ``forcing(model, None)`` runs the merged model alone, and
    ``recording(model)`` watches which expert is chosen.

    Args:
        model: holds the merged weights; its linear layers are replaced in place.
        experts: the fine-tuned state dicts by name.
        statistics: for each expert its Gramians, from :func:`~polytask.merging.gather_gramians`.
        rank: of the experts; 0 takes each layer's outputs divided by the number of experts.
        layers: patterns of the weights that get experts.

    Returns:
        The model itself, whose routers send each sample, at each layer, to one expert.

    Raises:
        InputError: statistics or weights that do not fit the model; no layer that could get experts.
    """
    return ESMPP(rank=rank, layers=layers).route(model, experts, statistics)


def _residual(name: str, label: str, state: Mapping[str, Tensor], merged: Tensor) -> Tensor:
    if name not in state or state[name].shape != merged.shape:
        raise InputError(
            f"{label} has no tensor {name} of shape {list(merged.shape)}: leave that layer out, it may be a task head"
        )
    return state[name].double() - merged.double()

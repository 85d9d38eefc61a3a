"""A library of low-rank experts on one frozen base."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.merging.adapter import placed, read_adapter
from polytask.merging.checkpoint import Checkpoint
from polytask.merging.in_memory import specs
from polytask.merging.routed import LowRank, Mix
from polytask.merging.routed_model import add_experts
from polytask.merging.routers import Router

Space = Literal["delta", "factors"]
Coefficients = Tensor | Mapping[str, Tensor] | None
"""One weight an expert, shape (experts,); the same by the weight's name; None for uniform ones."""

NAMED = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>A|B)(?:\.[^.]+)?\.weight$")
TURNED = re.compile(r"^(?P<layer>.+)\.lora_(?P<part>a|b)$")


@dataclass(frozen=True)
class ExpertLibrary:
    """Named low-rank experts trained on one base, without their data.

    Attributes:
        base: the model that they were trained on; it is copied whenever something is made of it.
        names: of the experts.
        layers: their updates, scales included, by the name of the weight in the base's state dict.
    """

    base: nn.Module
    names: tuple[str, ...]
    layers: Mapping[str, LowRank]

    @classmethod
    def from_states(cls, base: nn.Module, states: Mapping[str, Mapping[str, Tensor]], scale: float = 1.0) -> Self:
        """Experts from state dicts.

        Args:
            base: the model.
            states: by expert; tensors are called as peft does, ``LAYER.lora_A.weight`` (rank, inputs) and ``LAYER.lora_B.weight`` (outputs,
                rank), or as mttl does, ``LAYER.lora_a`` (inputs, rank) and ``LAYER.lora_b`` (rank, outputs).
            scale: alpha over the rank.

        Raises:
            InputError: a tensor of another name, half an update, shapes that do not fit the base.
        """
        return cls._stacked(base, {name: _pairs(state, name, scale) for name, state in states.items()})

    @classmethod
    def from_adapters(cls, base: nn.Module, folders: Mapping[str, Path]) -> Self:
        """Experts from folders of peft's adapters.

        Raises:
            InputError: an adapter for another base, or one that also holds whole tensors.
            StorageError: a file is missing or cut short.
        """
        like = Checkpoint(Path("the model given"), specs(base.state_dict(), "the model given"), (), _unread)
        pairs = {}
        for name, folder in folders.items():
            adapter = read_adapter(folder)
            adapter.check_low_rank()
            pairs[name] = {weight: adapter.pair(layer) for weight, layer in placed(adapter, like).items()}
        return cls._stacked(base, pairs)

    @classmethod
    def _stacked(cls, base: nn.Module, pairs: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> Self:
        if not pairs:
            raise InputError("a library needs at least one expert")
        known = base.state_dict()
        layers = {}
        for weight in dict.fromkeys(w for own in pairs.values() for w in own):
            if weight not in known:
                raise InputError(f"the base has no tensor {weight}, which an expert changes")
            out, width = known[weight].shape
            absent = (torch.zeros(1, width), torch.zeros(out, 1))  # an expert that leaves this layer alone
            own = {name: pairs[name].get(weight, absent) for name in pairs}
            for name, (A, B) in own.items():
                if (B.shape[0], A.shape[1]) != (out, width) or A.shape[0] != B.shape[1]:
                    raise InputError(
                        f"the update of {weight} by {name} is {list(B.shape)} x {list(A.shape)}, and the base's is {[out, width]}"
                    )
            layers[weight] = LowRank.stack(list(own.values()))
        return cls(base, tuple(pairs), layers)

    def subset(self, names: Iterable[str]) -> Self:
        """The library of some of the experts, in the order given.

        Raises:
            InputError: no expert of that name.
        """
        chosen = tuple(names)
        unknown = [n for n in chosen if n not in self.names]
        if unknown or not chosen:
            raise InputError(f"there is no expert {unknown[0] if unknown else ''!r}; there are {', '.join(self.names)}")
        at = [self.names.index(n) for n in chosen]
        return type(self)(self.base, chosen, {w: LowRank(low.A[at], low.B[at]) for w, low in self.layers.items()})

    def grouped(self, groups: Mapping[str, Sequence[str]]) -> Self:
        r"""A smaller library: the mean update of each group, exactly, as one expert of the group's summed rank."""
        joined: dict[str, LowRank] = {}
        for weight, low in self.layers.items():
            members = [[self.names.index(n) for n in group] for group in groups.values()]
            joined[weight] = LowRank.stack(
                [(low.A[at].flatten(0, 1), low.B[at].transpose(0, 1).flatten(1) / len(at)) for at in members]
            )
        return type(self)(self.base, tuple(groups), joined)

    def merged(self, weights: Coefficients = None, space: Space = "delta") -> nn.Module:
        r"""One plain model, as large and fast as the base.

        .. math:: W = W_0 + \sum_k w_k B_k A_k \quad (\text{delta}), \qquad W = W_0 + \bar B \bar A,\ \bar A = \sum_k w_k A_k,\
            \bar B = \sum_k w_k B_k \quad (\text{factors})

        Args:
            weights: w for all layers or by the weight's name; 1 / K when omitted.
            space: ``delta`` is exact; ``factors`` has cross terms :math:`w_j w_k B_j A_k` and is what merging adapters' files does.

        Raises:
            InputError: weights for another number of experts, or for a layer without experts.
        """
        w = self.by_layer(weights)
        model = copy.deepcopy(self.base)
        state = model.state_dict()
        for weight, low in self.layers.items():
            c = w[weight].to(low.A)
            update = low.delta(c) if space == "delta" else low.mixed(c)
            state[weight] += update.to(state[weight])
        return model

    def routed(self, router: Callable[[str, LowRank], Router], mix: Mix = "outputs") -> nn.Module:
        """A copy of the base with the experts beside its layers; see :func:`~polytask.merging.routed_model.add_experts`."""
        return add_experts(copy.deepcopy(self.base), self.names, self.layers, router, mix)

    def by_layer(self, weights: Coefficients) -> dict[str, Float[Tensor, " experts"]]:
        """Weights of the experts for each layer, from whatever form they were given in.

        Raises:
            InputError: as many as there are experts were not given, or a layer is unknown.
        """
        if weights is None:
            weights = torch.full((len(self.names),), 1 / len(self.names))
        given = weights if isinstance(weights, Mapping) else dict.fromkeys(self.layers, weights)
        if set(given) != set(self.layers):
            raise InputError(f"weights are given for {', '.join(given)}, and the layers are {', '.join(self.layers)}")
        for layer, w in given.items():
            if w.shape != (len(self.names),):
                raise InputError(f"{list(w.shape)} weights of {layer} are given for {len(self.names)} experts")
        return dict(given)

    @property
    def parameters(self) -> int:
        """Numbers that the experts hold, filled-up ranks included."""
        return sum(low.A.numel() + low.B.numel() for low in self.layers.values())


def _pairs(state: Mapping[str, Tensor], expert: str, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        named, turned = NAMED.match(name), TURNED.match(name)
        found = named or turned
        if found is None:
            raise InputError(f"{name} of the expert {expert} is no part of a low-rank update")
        parts.setdefault(found["layer"], {})[found["part"].upper()] = tensor if named else tensor.T
    for layer, have in parts.items():
        if set(have) != {"A", "B"}:
            raise InputError(f"the expert {expert} has only one half of the update of {layer}")
    return {f"{layer}.weight": (have["A"], scale * have["B"]) for layer, have in parts.items()}


def _unread(name: str, out: Any) -> None:
    raise NotImplementedError(f"{name} is in memory")

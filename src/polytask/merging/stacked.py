"""Layers of one or more models stacked into a model of another depth, with a configuration to match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import InputError
from polytask.merging.checkpoint import Checkpoint
from polytask.merging.matching import Match, Spec, check_spec, match, result_dtype, skipped
from polytask.merging.on_disk import MergePlan, configuration
from polytask.merging.proxy import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"^(.*?\.)?(\d+)\.")

BEFORE = re.compile(r"emb(?!ed_out)|wte|wpe|rotary|relative_pe|ln_pre|layernorm_pre|pre_la")
"""In names of tensors outside the layers that are used before the first one; the others are used after the last."""

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
"""What the number of layers is called in configurations."""

INDICES = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers")
"""Lists in configurations that hold numbers of layers; other lists with as many entries as there are layers hold one for each."""

RUNS = "attention_types"
"""GPT-Neo's list of runs of layers, each as kinds of attention in turn and how often they follow each other."""

NOT_BY_LAYER = re.compile(r"token|_ids?$|^architectures$|rope|label")

INNER = ("text_config", "llm_config", "language_config")
"""Where the configuration of a model's language part is."""


@dataclass(frozen=True)
class Piece:
    """A run of layers, merged from as many layers of each of some models.

    Attributes:
        models: the merged ones, the base first where there is one.
        starts: the first layer of each.
        count: of the layers.
        has_base: whether the first model is what the others were fine-tuned from.
    """

    models: tuple[Path, ...]
    starts: tuple[int, ...]
    count: int
    has_base: bool


@dataclass(frozen=True)
class Origin:
    """What one tensor of a stack is made of.

    Attributes:
        piece: the number of its piece.
        t: how far along the piece it is, from 0 to 1; 0 outside the layers.
        sources: models, and the tensor's name in each.
        has_base: whether the first is the base.
    """

    piece: int
    t: float
    sources: tuple[tuple[Checkpoint, str], ...]
    has_base: bool


class Stack:
    """Which tensors of which models make up a model of stacked layers.

    What comes before the layers is merged from the models of the first piece, what comes after them from those of the last, as
    mergekit has it.

    Args:
        pieces: from the first layer to the last.
        models: opened, by the paths that the pieces name.
        donor: whose configuration and tokenizer the result gets.

    Raises:
        InputError: a model with no layers or several stacks of them, models of different architectures or widths.
    """

    def __init__(self, pieces: Sequence[Piece], models: Mapping[Path, Checkpoint], donor: Path) -> None:
        self.pieces, self.models, self.donor = tuple(pieces), models, models[donor]
        self._layers = {p: _by_layer(m) for p, m in models.items()}
        self.origins: dict[str, Origin] = {}
        self._add_outside(0, before=True)
        first = 0
        for k, piece in enumerate(self.pieces):
            for i in range(piece.count):
                self._add_layer(k, i, first + i)
            first += piece.count
        self._add_outside(len(self.pieces) - 1, before=False)

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor, as the first of its models has it."""
        return {n: o.sources[0][0].specs[o.sources[0][1]] for n, o in self.origins.items()}

    @property
    def layers(self) -> list[tuple[Path, int]]:
        """The first model of every layer, and the layer's number in it."""
        return [(p.models[0], p.starts[0] + i) for p in self.pieces for i in range(p.count)]

    def check(self, skip: Iterable[str], *, mixed_dtypes: bool) -> None:
        """Refuse tensors that do not belong together, or not into the donor's architecture.

        Raises:
            InputError: a shape or dtype that differs; the message names tensor and model.
        """
        donor = str(self.donor.path)
        known: dict[str, list[Spec]] = {}
        for name, spec in self.donor.specs.items():
            known.setdefault(_template(name), []).append(spec)
        for name, origin in self.origins.items():
            if skipped(name, skip):
                continue
            (model, own), *others = origin.sources
            for other, theirs in others:
                check_spec(
                    theirs, str(other.path), other.specs[theirs], str(model.path), model.specs[own], mixed_dtypes
                )
            fitting = known.get(_template(name))
            if fitting is None:
                raise InputError(
                    f"{model.path} has a tensor {own}, and {donor} none like it: stack models of one architecture"
                )
            shape = model.specs[own].shape
            alike = [f for f in fitting if f.shape == shape]
            if not alike:
                raise InputError(
                    f"the tensor {own} has shape {list(shape)} in {model.path}, and {list(fitting[0].shape)} in {donor}: "
                    "stack models of one width"
                )
            if model.specs[own] not in alike:
                check_spec(own, str(model.path), model.specs[own], donor, alike[0], mixed_dtypes)
        lacking = [n for n in self.donor.specs if not LAYER.match(n) and n not in self.origins]
        if lacking:
            raise InputError(
                f"{donor} has a tensor {lacking[0]}, and the other models have not: stack models of one architecture"
            )

    def configured(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The donor's configuration for as many layers as there are, with each layer's own entry in lists of one a layer.

        Raises:
            InputError: it says nowhere how many layers there are.
        """
        deep = len(self._layers[self._donor_path][1])
        configs = {p: configuration(m.path) for p, m in self.models.items()}
        found = _restacked(said, deep, [(p, configs[p], i) for p, i in self.layers])
        if found == said and len(self.layers) != deep:
            raise InputError(
                f"{self.donor.path / CONFIG} does not say that there are {deep} layers ({', '.join(COUNTS[:3])}, ...): it cannot be changed"
            )
        if not _tells_layers_apart(said, deep):
            self._check_kinds()
        return found

    def _check_kinds(self) -> None:
        """Where a configuration tells by position what kind a layer is of, layers stand where such ones stood."""
        kinds = {i: frozenset(rests) for i, rests in self._layers[self._donor_path][1].items()}
        for number, (path, i) in enumerate(self.layers):
            wanted = kinds[min(number, len(kinds) - 1)]
            if frozenset(self._layers[path][1][i]) != wanted:
                raise InputError(
                    f"layer {i} of {self.models[path].path} is of another kind than layer {number} of {self.donor.path}, and its {CONFIG} "
                    "has no list that could say so: it cannot stand there"
                )

    @property
    def _donor_path(self) -> Path:
        return next(p for p, m in self.models.items() if m is self.donor)

    def _add_layer(self, k: int, i: int, number: int) -> None:
        piece = self.pieces[k]
        t = i / (piece.count - 1) if piece.count > 1 else 1.0
        stacks = [
            (self.models[p], *self._layers[p], start + i) for p, start in zip(piece.models, piece.starts, strict=True)
        ]
        (model, prefix, layers, at), *others = stacks
        for other, _, theirs, there in others:
            differing = sorted(set(layers[at]) ^ set(theirs[there]))
            if differing:
                raise InputError(
                    f"layer {at} of {model.path} and layer {there} of {other.path} differ in {differing[0]}: "
                    "merge layers of one architecture"
                )
        for rest in layers[at]:
            sources = tuple((m, f"{before}{there}.{rest}") for m, before, _, there in stacks)
            self.origins[f"{prefix}{number}.{rest}"] = Origin(k, t, sources, piece.has_base)

    def _add_outside(self, k: int, *, before: bool) -> None:
        piece = self.pieces[k]
        models = [self.models[p] for p in piece.models]
        for name in models[0].specs:
            if LAYER.match(name) or bool(BEFORE.search(name)) != before:
                continue
            lacking = [m for m in models if name not in m.specs]
            if lacking:
                raise InputError(
                    f"{lacking[0].path} has no tensor {name}, which {models[0].path} has: merge models of one architecture"
                )
            self.origins[name] = Origin(k, 0.0, tuple((m, name) for m in models), piece.has_base)


@dataclass(frozen=True)
class StackedPlan(MergePlan):
    """A :class:`~polytask.merging.on_disk.MergePlan` that stacks layers; its experts are all the models that they are of.

    Args:
        stack: which tensors make up the result.
    """

    stack: Stack = None  # type: ignore[assignment]

    def check(self) -> None:
        self.stack.check(self.skip, mixed_dtypes=self.dtype is not None)
        said = configuration(self.stack.donor.path)
        if said:
            self.stack.configured(said)
        alike: dict[tuple[int, bool], list[str]] = {}
        for name in self.match.merged:
            has_base = self.has_base(name)
            alike.setdefault((len(self.sources(name)) - has_base, has_base), []).append(name)
        for (experts, has_base), names in alike.items():
            self.engine.check(names, experts, has_base, 0)
        stages = [*self.engine.filters, *(self.engine.merger(n) for n in self.match.merged)]
        if len(alike) > 1 and any(stage.passes for stage in stages):
            raise InputError("what looks at the whole model first needs as many models in every slice")

    @cached_property
    def models(self) -> list[Checkpoint]:
        """The donor of the configuration, and the others."""
        return [self.stack.donor, *(m for m in self.stack.models.values() if m is not self.stack.donor)]

    @cached_property
    def match(self) -> Match:
        return match([(str(self.models[0].path), self.stack.specs)], self.skip)

    @property
    def reference(self) -> Checkpoint:
        return self.models[0]

    @cached_property
    def specs(self) -> dict[str, Spec]:
        dtype, merging = None if self.dtype is None else result_dtype(self.dtype), set(self.match.merged)
        return {n: Spec(s.shape, dtype) if dtype and n in merging else s for n, s in self.stack.specs.items()}

    def sources(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        return self.stack.origins[name].sources

    def has_base(self, name: str) -> bool:
        return self.stack.origins[name].has_base

    def taken(self, name: str) -> Tensor:
        model, own = self.sources(name)[0]
        return model.read(own)

    def configured(self, said: Mapping[str, Any]) -> dict[str, Any]:
        return self.stack.configured(super().configured(said))

    def record(self) -> dict[str, Any]:
        pieces = [
            {"models": [str(m) for m in p.models], "starts": list(p.starts), "layers": p.count, "has_base": p.has_base}
            for p in self.stack.pieces
        ]
        return {**super().record(), "slices": pieces}


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, by what stands before the layer's number in the names."""
    depth: dict[str, int] = {}
    for name in names:
        found = LAYER.match(name)
        if found:
            depth[found[1] or ""] = max(depth.get(found[1] or "", 0), int(found[2]) + 1)
    return depth


def _by_layer(model: Checkpoint) -> tuple[str, dict[int, list[str]]]:
    """What stands before a layer's number in the names of a model, and what stands after it, for each layer."""
    stacks = layers_of(model.specs)
    if len(stacks) != 1:
        have = f"{len(stacks)} stacks of layers ({', '.join(stacks)})" if stacks else "no numbered layers"
        raise InputError(f"{model.path} has {have}: only a model with one stack can be taken apart")
    prefix = next(iter(stacks))
    layers: dict[int, list[str]] = {i: [] for i in range(stacks[prefix])}
    for name in model.specs:
        found = LAYER.match(name)
        if found:
            layers[int(found[2])].append(name[found.end() :])
    return prefix, layers


def _template(name: str) -> str:
    return LAYER.sub(lambda found: f"{found[1] or ''}*.", name)


def _restacked(
    said: Mapping[str, Any], deep: int, layers: Sequence[tuple[Path, Mapping[str, Any], int]]
) -> dict[str, Any]:
    """A configuration for other layers: of each, its model's path and configuration, and its number there."""
    found = dict(said)
    for key, value in said.items():
        if key in COUNTS and value == deep:
            found[key] = len(layers)
        elif key in INDICES and isinstance(value, list):
            found[key] = [k for k, (_, own, i) in enumerate(layers) if i in own.get(key, value)]
        elif key == RUNS and isinstance(value, list):
            found[key] = [[[_entry(key, p, _unrolled(own.get(key, value)), i)], 1] for p, own, i in layers]
        elif key in INNER and isinstance(value, dict):
            found[key] = _restacked(value, deep, [(p, own.get(key) or {}, i) for p, own, i in layers])
        elif isinstance(value, list) and len(value) == deep and not NOT_BY_LAYER.search(key):
            found[key] = [_entry(key, p, own.get(key, value), i) for p, own, i in layers]
    return found


def _unrolled(runs: Sequence[Any]) -> list[Any]:
    return [kind for kinds, times in runs for _ in range(times) for kind in kinds]


def _tells_layers_apart(said: Mapping[str, Any], deep: int) -> bool:
    """Whether a configuration has a list with an entry a layer, or of layers' numbers."""
    lists = {k: v for k, v in said.items() if isinstance(v, list) and not NOT_BY_LAYER.search(k)}
    inner = (said[k] for k in INNER if isinstance(said.get(k), dict))
    return any(k in INDICES or len(v) == deep for k, v in lists.items()) or any(
        _tells_layers_apart(s, deep) for s in inner
    )


def _entry(key: str, model: Path, values: Any, i: int) -> Any:
    if not isinstance(values, list) or i >= len(values):
        raise InputError(f"the configuration of {model} has no {key} of layer {i}")
    return values[i]

"""Merging that looks at how the merged model answers: coefficients are learned on inputs of every task, mostly without labels."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging.base import Filter, place_of
from polytask.merging.engine import check_finite, written_as
from polytask.merging.fusion import logits_of
from polytask.merging.in_memory import State, built, by_expert, make_filter, merging_method, specs
from polytask.merging.matching import match, result_dtype, torch_dtype
from polytask.merging.statistics import holding

if TYPE_CHECKING:
    from polytask.registry import Method


@dataclass
class Bench:
    """A model, its base and experts as tensors, and every task's inputs: what an adaptive method works with.

    Attributes:
        model: the architecture; its own weights are not looked at.
        W0: the base's tensors that are merged, float32 or float64.
        D: the task vectors, one row an expert, by tensor.
        apart: for each expert, the tensors that are not merged, such as its head.
        batches: for each expert, its task's inputs, or pairs of inputs and labels where the method takes labels.
        labelled: whether they are such pairs.
        seed: of random draws.
    """

    model: nn.Module
    W0: dict[str, Tensor]
    D: dict[str, Float[Tensor, "experts ..."]]
    apart: dict[str, dict[str, Tensor]]
    batches: dict[str, list[Any]]
    labelled: bool = False
    seed: int = 0
    _turns: dict[str, Iterator[Any]] = field(default_factory=dict)

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Names of the model's tensors that are no parameters."""
        return frozenset(n for n, _ in self.model.named_buffers())

    def next_batch(self, expert: str) -> Any:
        """The expert's batches, one after another and round again."""
        return next(self._turns.setdefault(expert, cycle(self.batches[expert])))

    def logits(self, W: Mapping[str, Tensor], expert: str, inputs: Any) -> Float[Tensor, "... classes"]:
        """What a model with the shared tensors W and the expert's own ones answers."""
        args, named = (inputs, {}) if isinstance(inputs, tuple | list) else ((inputs,), {})
        if isinstance(inputs, dict):
            args, named = (), inputs
        # running means and the like are merged, but no loss has a slope along them
        state = {n: v.detach() if n in self.buffers else v for n, v in W.items()} | self.apart[expert]
        return logits_of(functional_call(self.model, state, tuple(args), named))

    def loss(self, W: Mapping[str, Tensor], expert: str, batch: Any) -> Float[Tensor, ""]:
        """What the answers to a batch are judged by: their cross-entropy where there are labels, else their entropy."""
        if not self.labelled:
            return entropy(self.logits(W, expert, batch))
        inputs, labels = batch
        z = self.logits(W, expert, inputs)
        return F.cross_entropy(z.flatten(0, -2), labels.flatten())

    @torch.no_grad()
    def agreement(self, W: Mapping[str, Tensor]) -> Float[Tensor, " inputs"]:
        """Which inputs a model with the shared tensors W answers as their task's expert does: 1 or 0, the tasks' one after another."""
        same = []
        for k, (expert, batches) in enumerate(self.batches.items()):
            own = {n: self.W0[n] + D[k] for n, D in self.D.items()}
            for batch in batches:
                inputs = batch[0] if self.labelled else batch
                same.append(self.logits(W, expert, inputs).argmax(-1) == self.logits(own, expert, inputs).argmax(-1))
        return torch.cat([s.flatten() for s in same]).double()

    def with_weights(self, W: Mapping[str, Tensor], expert: str) -> nn.Module:
        """The model itself, holding those weights, for what must be hooked."""
        return holding(self.model, {**W, **self.apart[expert]})


class Adaptive(ABC):
    """A way of merging that runs the model.

    Attributes:
        takes_labels: whether its batches are pairs of inputs and labels.
        learns: whether it descends on batches, and so wants as many inputs as there are; few do for statistics.
    """

    method: ClassVar[Method]
    needs: ClassVar[str] = "inputs"
    takes_labels: bool = False
    learns: ClassVar[bool] = True

    @abstractmethod
    def fit(self, bench: Bench) -> dict[str, Tensor]:
        """The merged tensors, by name."""


def entropy(logits: Float[Tensor, "... classes"]) -> Float[Tensor, ""]:
    """The mean entropy of the predicted distributions."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def settle(
    bench: Bench,
    merged: Callable[[], Mapping[str, Tensor]],
    learned: Sequence[Tensor],
    steps: int,
    learning_rate: float,
    unit: bool = False,
) -> None:
    """Make the merged model sure of its answers, or right about labels: Adam on the sum of the tasks' losses.

    Args:
        bench: what the model is run on, one batch of every task a step.
        merged: the tensors that follow from what is learned, with graph.
        learned: the leaves that are moved.
        steps: of Adam.
        learning_rate: of Adam.
        unit: keep what is learned between 0 and 1.

    Cost: a forward and a backward pass a step and task.
    """
    if not learned:
        return
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    for _ in range(steps):
        W = merged()
        total = torch.stack([bench.loss(W, t, bench.next_batch(t)) for t in bench.batches]).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if unit:
            with torch.no_grad():
                for each in learned:
                    each.clamp_(0, 1)


def adapt(
    model: nn.Module,
    base: State,
    experts: Mapping[str, State],
    batches: Mapping[str, Sequence[Any]],
    method: str = "adamerging",
    *,
    skip: str | Sequence[str] = (),
    filters: Filter | str | Sequence[Filter | str] = (),
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    check: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge by a method that runs the merged model on inputs of every task.

    Methods that lower entropy make the merged model sure of its answers, which is not the same as right. Experts are right about most of
    their own inputs: a result that answers fewer of them as they do than the base or the mean of the experts is warned of.

    Args:
        model: the architecture; a classifier whose output is logits, in evaluation mode while it runs. It is left as it was.
        base: the state dict that the experts were fine-tuned from.
        experts: their state dicts, by name.
        batches: {expert: inputs of its task}; a tuple is unpacked into positional arguments, a dict into named ones. Methods with labels
            take pairs of inputs and labels instead.
        method: ``adamerging``, ``adarank``, ``concrete``, ``frank_wolfe`` or ``regmean_pp``.
        skip: patterns of tensors that are not merged, such as ``"head.*"``: each task is run with its expert's own.
        filters: of task vectors, applied before, such as ``"trim"``.
        dtype: of the merged tensors; the base's when omitted.
        seed: of random draws in filters and methods.
        check: compare the result's answers with the experts', filtered ones where there are filters; takes a few forward passes.
        options: the method's own.

    Returns:
        The merged state dict; tensors that are not merged are the base's.

    Raises:
        InputError: models that do not fit together or into ``model``, a task without inputs, batches without the labels that were
            promised, an unknown method or option.

    Cost: the method's; memory for the base, all task vectors, and a few models more.
    """
    entry = merging_method(method)
    if not (isinstance(entry.factory, type) and issubclass(entry.factory, Adaptive)):
        raise InputError(f"{entry.name} does not run the model: polytask.merging.merge merges by it")
    fitting: Adaptive = built(entry, options)
    wanted = None if dtype is None else torch_dtype(result_dtype(dtype))
    chosen = [filters] if isinstance(filters, str | Filter) else filters
    if fitting.takes_labels:
        _check_pairs(batches, entry.name)
    bench = _bench(model, base, experts, batches, skip, chosen, seed, wanted is not None)
    bench.labelled = fitting.takes_labels
    merged = fitting.fit(bench)
    if check:
        _warn_of_a_way_off(bench, merged, entry.name)
    merged |= {n: merged[first] for n, first in _tied(model, base).items() if first in merged and n in base}
    result = {n: v.detach().clone() for n, v in base.items()}
    return result | {
        n: written_as(v.detach(), wanted or base[n].dtype, n).to(base[n].device) for n, v in merged.items()
    }


def _tied(model: nn.Module, base: State) -> dict[str, str]:
    """Names of tensors that a model also has under another one, which the base has if it has any: {name: that one}."""
    names: dict[int, str] = {}
    tied = {}
    tensors = model.state_dict(keep_vars=True)
    for n, v in sorted(tensors.items(), key=lambda item: item[0] not in base):
        first = names.setdefault(id(v), n)
        if first != n:
            tied[n] = first
    return tied


def _check_pairs(batches: Mapping[str, Sequence[Any]], name: str) -> None:
    for expert, found in batches.items():
        if not all(isinstance(b, tuple | list) and len(b) == 2 and isinstance(b[1], Tensor) for b in found):
            raise InputError(
                f"{name} was told labels: its batches are pairs of inputs and labels, and those of {expert} are not"
            )


def _warn_of_a_way_off(bench: Bench, merged: Mapping[str, Tensor], name: str) -> None:
    simple = {"the base": bench.W0, "the mean of the experts": {n: bench.W0[n] + D.mean(0) for n, D in bench.D.items()}}
    shares = {label: bench.agreement(W) for label, W in simple.items()}
    found, better = bench.agreement(merged), max(shares, key=lambda label: float(shares[label].mean()))
    lost = shares[better] - found
    if lost.mean() > 2 * lost.std() / len(lost) ** 0.5:  # beyond what so few inputs do by chance
        warnings.warn(
            f"{name} led away from the experts: the merged model answers {float(found.mean()):.0%} of the inputs as their task's expert "
            f"does, {better} {float(shares[better].mean()):.0%}; keep that, or a method that needs no inputs",
            stacklevel=3,
        )


def _bench(
    model: nn.Module,
    base: State,
    experts: Mapping[str, State],
    batches: Mapping[str, Sequence[Any]],
    skip: str | Sequence[str],
    filters: Sequence[Filter | str],
    seed: int,
    mixed_dtypes: bool,
) -> Bench:
    if not experts:
        raise InputError("there is nothing to merge: no expert was given")
    of_each = by_expert(batches, list(experts))
    models = [("the base", base), *experts.items()]
    found = match([(label, specs(s, label)) for label, s in models], skip, mixed_dtypes=mixed_dtypes)
    tied = _tied(model, base)
    lacking = [n for n in model.state_dict() if n not in base and tied.get(n) not in base]
    if lacking:
        raise InputError(f"the model has a tensor {lacking[0]}, which the base has not: build the base's architecture")
    for label, state in models:
        for n in found.merged:
            check_finite(state[n], n, label)
    wide = {n: torch.promote_types(base[n].dtype, torch.float32) for n in found.merged if n not in tied}
    W0 = {n: base[n].detach().to("cpu", to, copy=True) for n, to in wide.items()}
    D = {n: torch.stack([s[n].detach().to("cpu", to) - W0[n] for s in experts.values()]) for n, to in wide.items()}
    for given in filters:
        each = make_filter(given) if isinstance(given, str) else given
        if each.passes:
            raise InputError(f"{each.method.name} must see the whole model first: choose its scope 'tensor' here")
        D = {n: each.apply(W0[n], d, place_of(n, seed)) for n, d in D.items()}
    apart = {
        e: {n: v.detach().clone() for n, v in s.items() if n not in W0 and n not in tied} for e, s in experts.items()
    }
    clean = deepcopy(model).cpu().eval().requires_grad_(False)
    return Bench(clean, W0, D, apart, {e: list(of_each[e]) for e in experts}, seed=seed)

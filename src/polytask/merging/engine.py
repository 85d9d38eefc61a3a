"""Filters and a merger at work on one tensor after another, wherever the tensors come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from polytask.errors import InputError
from polytask.merging.base import TURNED, Filter, Merger, Place, Stage, TaskVectorMerger, pieces, place_of
from polytask.merging.matching import NAMED, dtype_name

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Load: TypeAlias = "Callable[[str], tuple[Tensor | None, Tensor]]"
"""Gives the base's tensor and the experts', one a row, in the dtype that is computed in, both free to be overwritten."""

VARIANCE = "running_var"
"""The end of the names of what batch normalisation divides by the root of."""


@dataclass
class Engine:
    """What happens to every tensor of a merge.

    Attributes:
        merger: the merger of a tensor, by the tensor's name: options may differ between layers.
        filters: applied to the task vectors in turn.
        statistics: for each expert, what it needs statistics of, by the tensor's name; none for most methods.
        seed: of all random draws.
        kept: what a survey keeps for merging.
    """

    merger: Callable[[str], Merger]
    filters: Sequence[Filter] = ()
    statistics: Sequence[Mapping[str, Tensor]] = ()
    seed: int = 0
    kept: MutableMapping[str, Tensor] = field(default_factory=dict)

    def check(self, names: Sequence[str], experts: int, has_base: bool, gathered: int) -> None:
        """Refuse what cannot work, before any tensor is read.

        Args:
            names: of the tensors to be merged.
            experts: how many there are.
            has_base: whether there is a base.
            gathered: of how many experts there are statistics, or will be.

        Raises:
            InputError: the number of experts, a missing base or statistic, filters before a method without task vectors.
        """
        for merger in dict.fromkeys(map(self.merger, names)):
            merger.check_experts(experts)
            if not isinstance(merger, TaskVectorMerger) and self.filters:
                raise InputError(f"{merger.method.name} does not merge task vectors: no filter can go before it")
            if isinstance(merger, TaskVectorMerger) and not has_base:
                raise InputError(
                    f"{merger.method.name} merges task vectors: it needs the base that the experts started from"
                )
            if merger.needs == "statistics" and gathered != experts:
                raise InputError(
                    f"{merger.method.name} needs a statistic of each of the {experts} experts ({merger.statistic}), "
                    f"and {gathered} were given"
                )

    def check_statistics(self, names: Sequence[str]) -> None:
        """Refuse statistics of another model.

        Raises:
            InputError: there is no tensor to be merged of which every expert has one.
        """
        found = [{n.removesuffix(TURNED) for n in s} for s in self.statistics]
        if found and not any(all(n in each for each in found) for n in names):
            of = ", ".join(sorted(found[0])[:NAMED]) or "nothing"
            raise InputError(
                f"the statistics are of {of}: of no tensor that is merged, such as {', '.join(names[:NAMED])}"
            )

    def survey(self, names: Sequence[str], load: Load, told: Callable[[str], None] | None = None) -> None:
        """Let every stage that must see the whole model see it, as often as it asks.

        Args:
            names: of the tensors to be merged.
            load: reads one of them.
            told: called with the name of each tensor before it is looked at.

        Raises:
            InputError: a method that surveys the model is given other options for some tensors.
        """
        mergers: list[Stage] = list(dict.fromkeys(map(self.merger, names)))
        if len(mergers) > 1 and any(m.passes for m in mergers):
            raise InputError("a method that looks at the whole model first takes the same options for every tensor")
        for i, stage in enumerate([*self.filters, *mergers]):
            stage.kept = self.kept
            stage.begin()
            done = 0
            while done < stage.passes:
                for name in names:
                    if told is not None:
                        told(name)
                    W0, W = load(name)
                    assert W0 is not None
                    place = place_of(name, self.seed, self.statistics)
                    if place.turned:
                        W0, W = laid_as_linear(W0), laid_as_linear(W)
                    with torch.no_grad():
                        stage.survey(W0, self._filtered(W0, W.sub_(W0), place, i), place)
                stage.end_pass()
                done += 1

    def merge(self, name: str, W0: Tensor | None, W: Float[Tensor, "experts ..."]) -> Tensor:
        """The merged tensor, in the dtype it is computed in; both arguments may be overwritten."""
        with torch.no_grad():
            if not name.endswith(VARIANCE):
                return self._merged(name, W0, W)
            # sums of task vectors may lead below zero, where a normalisation layer would answer NaN
            least = W.amin(0) if W0 is None else torch.minimum(W.amin(0), W0)
            merged = self._merged(name, W0, W)
            return torch.where(merged < 0, least, merged)

    def _merged(self, name: str, W0: Tensor | None, W: Float[Tensor, "experts ..."]) -> Tensor:
        merger, place = self.merger(name), place_of(name, self.seed, self.statistics)
        if place.turned:
            W0, W = None if W0 is None else laid_as_linear(W0), laid_as_linear(W)
        if not self.filters:
            merged = merger.merge(W0, W, place)
        else:
            assert W0 is not None
            assert isinstance(merger, TaskVectorMerger)
            merged = merger.add_to_base(W0, self._filtered(W0, W.sub_(W0), place, len(self.filters)), place)
        return laid_as_linear(merged) if place.turned else merged

    def _filtered(self, W0: Tensor, D: Tensor, place: Place, count: int) -> Tensor:
        for each in self.filters[:count]:
            D = each.apply(W0, D, place)
        return D


def laid_as_linear(W: Float[Tensor, "... m n"]) -> Float[Tensor, "... n m"]:
    """Weights kept as (inputs, outputs) as (outputs, inputs), and back."""
    return W.transpose(-1, -2).contiguous()


def all_finite(x: Float[Tensor, "..."]) -> bool:
    """Whether no entry is NaN or infinite; a sum tells unless it overflows."""
    flat = x.reshape(-1)
    return bool(torch.isfinite(flat.sum(dtype=torch.float32))) or all(
        bool(torch.isfinite(p).all()) for p in pieces(flat)
    )


def check_finite(x: Float[Tensor, "..."], name: str, label: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        InputError: naming the tensor and the model.
    """
    if not all_finite(x):
        raise InputError(f"the tensor {name} of {label} holds NaN or infinite values")


def written_as(merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The merged tensor in the dtype of the result.

    Raises:
        InputError: a value is too large for that dtype.
    """
    stored = merged.to(dtype)
    if not all_finite(stored):
        raise InputError(f"the merged tensor {name} does not fit into {dtype_name(dtype)}: choose another dtype")
    return stored

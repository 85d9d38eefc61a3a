"""What a merging method is: several tensors of one name in, one tensor out.

==========================  ==================================================  ==========================================
base class                  a method writes                                     it is given
==========================  ==================================================  ==========================================
:class:`WeightMerger`       ``combine(W, place) -> tensor``                     the experts' tensors, one a row
:class:`TaskVectorMerger`   ``update(W0, D, place) -> tensor``                  the base's tensor and the task vectors
:class:`Filter`             ``apply(W0, D, place) -> task vectors``             the same; runs before any TaskVectorMerger
==========================  ==================================================  ==========================================

All arithmetic is done in float32, or float64 where an input is float64; the callers (:mod:`polytask.merging.in_memory`,
:mod:`polytask.merging.on_disk`) convert, and hand over rows that may be overwritten: that is how merging T experts stays within T + 2
tensors. A method that must see the whole model before it can merge a tensor declares ``passes`` and is shown every tensor that often.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypedDict

import torch

from polytask.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from polytask.registry import Method

CHUNK = 1 << 18
"""Elements handled at a time by elementwise methods, so that their scratch memory does not grow with the tensor."""

TURNED = ".T"
"""Behind a weight's name in statistics of layers that keep it as (inputs, outputs)."""

PerExpert = float | Sequence[float]


class TaskVectorOptions(TypedDict, total=False):
    """What every merger of task vectors takes beside its own options; see :class:`TaskVectorMerger`."""

    scale: float
    weights: PerExpert


@dataclass(frozen=True)
class OfEach(Sequence["Tensor"]):
    """The statistics of one tensor, one an expert; those on disk come into memory one at a time."""

    name: str
    experts: Sequence[Mapping[str, Tensor]]

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, t: int) -> Tensor:  # type: ignore[override]
        return self.experts[t][self.name].double()


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor stands, and what is known of it.

    Attributes:
        name: the tensor's name in the state dict.
        seed: what the random draws at this place are seeded with, beside the name.
        statistics: for each expert, the statistic that the method asked for (a Gramian, a Fisher diagonal), float64, read when it is
            taken; empty where there is none for this tensor.
        turned: whether the tensor is a weight (inputs, outputs); methods are given it as (outputs, inputs).
    """

    name: str
    seed: int = 0
    statistics: Sequence[Tensor] = field(default=())
    turned: bool = False

    def generator(self, expert: int = 0) -> torch.Generator:
        """A generator of this tensor and expert alone: draws depend on no order of work, so that a resumed merge equals an unbroken one."""
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{expert}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Stage(ABC):
    """What mergers and filters share: the passes over the model that must come before the first tensor is merged.

    Attributes:
        passes: how many times :meth:`survey` wants to see every tensor.
        scratch: memory needed beside the base's tensor and the task vectors, in multiples of that tensor; what ``--dry-run`` adds up.
        scratch_per_expert: the same, for each expert: of methods that must keep the task vectors while another one works on a copy.
        kept: where a survey puts tensors that merging will need: memory for models in memory, files for models on disk. What is there
            already, when a merge was killed and started again, need not be computed again.
    """

    method: ClassVar[Method]
    passes: int = 0
    scratch: float = 1.0
    scratch_per_expert: float = 0.0
    kept: MutableMapping[str, Tensor]

    def begin(self) -> None:  # noqa: B027
        """Told before the first pass over a model: forget what was seen of another."""

    def survey(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> None:  # noqa: B027
        """Look at a tensor before anything is merged; D may not be changed."""

    def end_pass(self) -> None:  # noqa: B027
        """Told when every tensor has been surveyed once more."""


class Filter(Stage):
    """A map from task vectors to task vectors, to be put before any merger of task vectors."""

    @abstractmethod
    def apply(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        """The filtered task vectors, shape (experts, ...); D may be overwritten."""


class Merger(Stage):
    """A rule that makes one tensor of several.

    Attributes:
        needs: the least it asks for: ``experts``, ``base`` (the experts' common ancestor) or ``statistics`` (gathered on data).
        statistic: which statistic, for ``needs = "statistics"``.
        fewest: experts it takes at least.
        most: experts it takes at most.
        keeps: the position of the expert whose own tensors stand where none are merged; the base's do where it is None.
    """

    needs: ClassVar[str]
    statistic: ClassVar[str | None] = None
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    keeps: int | None = None

    @abstractmethod
    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        """The merged tensor, given the base's and the experts'; both may be overwritten."""

    def check_experts(self, count: int) -> None:
        """Refuse a number of experts that the method cannot work with.

        Raises:
            InputError: too few or too many.
        """
        if count < self.fewest or (self.most is not None and count > self.most):
            wanted = f"at least {self.fewest}" if self.most is None else f"{self.fewest} to {self.most}"
            wanted = "one expert alone" if self.most == 1 else f"{wanted} experts"
            raise InputError(f"{self.method.name} merges {wanted}, not {count}")


class WeightMerger(Merger):
    """A method that combines the experts' weights themselves and needs no common ancestor."""

    needs = "experts"

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        return self.combine(W, place)

    @abstractmethod
    def combine(self, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        """The merged tensor; W may be overwritten."""


class TaskVectorMerger(Merger):
    r"""A method that combines the task vectors :math:`\tau_t = W_t - W_0` and adds the outcome to the base.

    .. math:: W = W_0 + \lambda\, M(w_1 \tau_1, \dots, w_T \tau_T)

    Args:
        scale: :math:`\lambda`.
        weights: :math:`w_t`, one number for all experts or one each.
    """

    needs = "base"
    weighs_itself: ClassVar[bool] = False
    """Whether ``update`` applies the weights, because it also normalises by them."""

    def __init__(self, *, scale: float = 1.0, weights: PerExpert = 1.0) -> None:
        in_range(scale, "the scale", float("-inf"), float("inf"))
        in_range(weights, "a weight", float("-inf"), float("inf"), each=True)
        self.scale, self.weights = scale, weights

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if W0 is None:
            raise InputError(f"{self.method.name} merges task vectors: it needs the base that the experts started from")
        return self.add_to_base(W0, W.sub_(W0), place)

    def add_to_base(self, W0: Tensor, D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        """The merged tensor, given the base's tensor and the task vectors; both may be overwritten."""
        return W0.add_(self.update(W0, D if self.weighs_itself else self.weighed(D), place), alpha=self.scale)

    def weighed(self, D: Float[Tensor, "experts ..."]) -> Float[Tensor, "experts ..."]:
        """The task vectors times the experts' weights, in place."""
        if self.weights != 1.0:
            for row, w in zip(D, per_expert(self.weights, len(D), "weights"), strict=True):
                row *= w
        return D

    @abstractmethod
    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        """The merged task vector; D may be overwritten, W0 not."""


class MatrixMerger(TaskVectorMerger):
    """A method defined on matrices; tensors of any other rank get the mean of their task vectors, as its authors do."""

    def update(self, W0: Float[Tensor, "..."], D: Float[Tensor, "experts ..."], place: Place) -> Tensor:
        if D.ndim != 3 or 0 in D.shape:
            return D.mean(0)
        return self.update_matrix(W0, D, place)

    @abstractmethod
    def update_matrix(self, W0: Float[Tensor, "m n"], D: Float[Tensor, "experts m n"], place: Place) -> Tensor:
        """The merged task vector of one matrix; D may be overwritten, W0 not."""


def per_expert(value: PerExpert, experts: int, name: str) -> list[float]:
    """One number for each expert, from one number or a sequence of them.

    Raises:
        InputError: as many numbers as there are experts were not given.
    """
    values = [float(value)] * experts if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != experts:
        raise InputError(f"{name} holds {len(values)} numbers for {experts} experts")
    return values


def chunks(D: Float[Tensor, "experts ..."]) -> Iterator[tuple[slice, Float[Tensor, "experts chunk"]]]:
    """The rows of D in pieces of some columns and a bounded number of entries: (where, view)."""
    flat = D.view(len(D), -1)
    columns = max(1, CHUNK // max(1, len(D)))
    for start in range(0, flat.shape[1], columns):
        where = slice(start, start + columns)
        yield where, flat[:, where]


def place_of(name: str, seed: int, statistics: Sequence[Mapping[str, Tensor]] = ()) -> Place:
    """The place of a tensor, with the experts' statistics of it where all of them have one."""
    for turned in (False, True):
        stored = name + TURNED * turned
        if all(stored in s for s in statistics):
            return Place(name, seed, OfEach(stored, statistics), turned and bool(statistics))
    return Place(name, seed)


def pieces(x: Float[Tensor, "..."], size: int = CHUNK) -> Iterator[Float[Tensor, " piece"]]:
    """A tensor's entries in pieces of a bounded number of them."""
    flat = x.reshape(-1)
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


def as_patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    """Patterns of tensors' names, given as one or several."""
    return (value,) if isinstance(value, str) else tuple(value)


def in_range(
    value: PerExpert, name: str, low: float, high: float, *, open_low: bool = False, each: bool = False
) -> None:
    """Check a number, or with ``each`` perhaps one for each expert, when a method is made.

    Raises:
        InputError: outside [low, high], or no number.
    """
    for v in value if each and isinstance(value, list | tuple) else [value]:
        if isinstance(v, bool) or not isinstance(v, int | float):
            raise InputError(f"{name} is a number{', or one for each expert' * each}, not {v!r}")
        if not (low < v if open_low else low <= v) or not v <= high:
            beside = f", not at {low:g}" if open_low else ""
            raise InputError(f"{name} lies between {low:g} and {high:g}{beside}, not {v}")

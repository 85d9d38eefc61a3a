"""Merging models on disk by a method that runs the merged model: whole models are in memory while it learns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import InputError, PolytaskError
from polytask.merging.adaptive import Adaptive, adapt
from polytask.merging.checkpoint import Checkpoint
from polytask.merging.in_memory import built, merging_method
from polytask.merging.matching import ITEMSIZE, torch_dtype
from polytask.merging.on_disk import KEPT, MergePlan
from polytask.merging.proxy import of_dtype, stored_names
from polytask.merging.stored import CheckpointTensors, Renamed, StoredTensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
"""Examples a batch, as AdaMerging's authors take."""

IN_MEMORY = 4
"""Models held beside the base and the task vectors: the one that runs, the merged one, its gradient, and its graph."""


class AdaptivePlan(MergePlan):
    """A :class:`~polytask.merging.on_disk.MergePlan` whose method learns from proxy inputs before the first tensor is written."""

    @cached_property
    def fitting(self) -> Adaptive:
        """The method with its options, the same for all tensors."""
        first = self.options(self.match.merged[0])
        if any(self.options(n) != first for n in self.match.merged):
            raise InputError(f"{self.method} takes the same options for every tensor")
        made: Adaptive = built(merging_method(self.method), first)
        return made

    @property
    def looks_at_data(self) -> bool:
        return True

    @property
    def statistic(self) -> str | None:
        return None

    @property
    def reference(self) -> Checkpoint:
        return self.models[0]

    def check(self) -> None:
        if self.base is None:
            raise InputError(f"{self.method} merges task vectors: it needs the base that the experts started from")
        doubled = [n for n in self.names if self.names.count(n) > 1]
        if doubled:
            raise InputError(f"two experts are called {doubled[0]}: inputs go by the experts' names")
        assert isinstance(self.fitting, Adaptive)

    @cached_property
    def peak_bytes(self) -> int:
        width = max(ITEMSIZE[self._compute_dtype(n)] for n in self.match.merged)
        return (len(self.models) + IN_MEMORY) * width * sum(s.elements for s in self.specs.values())

    def prepare(self, work: Path, told: Callable[[str], None]) -> None:
        file = work / KEPT / "learned.safetensors"
        if not file.exists():
            told(f"{self.method} is learning")
            file.parent.mkdir(exist_ok=True)
            save_tensors(file, self._learned())
        self.learned = StoredTensors(file)

    def merged(self, name: str) -> Tensor:
        # what the model has no place for is learned by no input: it gets the mean
        return self.learned[name] if name in self.learned else self.load(name)[1].mean(0)

    def _learned(self) -> dict[str, Tensor]:
        """The merged tensors by their names in the files."""
        assert self.proxy is not None
        experts, merging = self.models[-len(self.experts) :], set(self.match.merged)
        wide = torch_dtype("float64" if any(self._compute_dtype(n) == "float64" for n in merging) else "float32")
        model = self.proxy.build(experts[0], self.base_folder).to(wide)
        names = stored_names(model, experts[0])
        base, *states = (Renamed(CheckpointTensors(m), names) for m in self.models)
        inputs = {
            n: self.proxy.batches(experts, t, self.base_folder, rows=ROWS, labelled=self.fitting.takes_labels)
            for t, n in enumerate(self.names)
        }
        learned = self._run(
            model,
            base,
            dict(zip(self.names, states, strict=True)),
            {n: [of_dtype(b, wide) for b in found] for n, found in inputs.items()},
            self.method,
            skip=[n for n, old in names.items() if old not in merging],
            filters=self.filters,
            dtype=wide,
            seed=self.seed,
            **self.options(self.match.merged[0]),
        )
        return {old: learned[n] for n, old in names.items() if old in merging}

    def _run(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        try:
            return adapt(*arguments, **options)
        except PolytaskError:
            raise
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
            assert self.proxy is not None
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{self.method} cannot run the model on {self.proxy.data}, or its answers and labels do not fit together: {reason}"
            ) from None

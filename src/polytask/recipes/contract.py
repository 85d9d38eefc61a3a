"""The recipe contract: a recipe says what one trial is and when its claim holds; everything around it is here, once for all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from polytask.errors import InputError, TrainingError
from polytask.recipes.evidence import Evidence
from polytask.recipes.results import Arm, Measure, Results, Row, Trial

__all__ = ["Arm", "Check", "Measure", "Progress", "Recipe", "Trial"]

Progress = Callable[[str, int, int], None]
"""Told what was just done, how many trials are done, and of how many."""


@dataclass(frozen=True)
class Check:
    """One part of the claim, in words that hold the numbers, and whether it was met."""

    text: str
    holds: bool


@dataclass(frozen=True)
class RecipeInfo:
    """What is known of a recipe before it runs.

    Args:
        name: lower case with dashes, unique.
        domain: the folder it lives in, what it is about.
        paper: where the system was published, e.g. ``arXiv:2605.22635``.
        claim: one sentence that the evidence supports or refutes.
        reference: the figures of the specification or paper that ours stand beside, said to be theirs.
        seeds: how many are run unless told otherwise.
        quick: options of a quick look that takes seconds.
        factory: the class.
    """

    name: str
    domain: str
    paper: str
    claim: str
    reference: str
    seeds: int
    factory: type[Recipe]
    quick: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]


class Recipe(ABC):
    """One published system: its arms, one trial of an arm, and the test of its claim.

    Subclasses are made dataclasses by the decorator :func:`~polytask.recipes.recipe`: their fields are the recipe's options.

    Attributes:
        info: name, domain, paper, claim, reference, and what ``quick`` means, as registered.
        arms: the contestants; single-task references, equal weighting and a tuned scalarization among them wherever they make sense.
        measures: what every trial measures.
    """

    info: ClassVar[RecipeInfo]
    arms: ClassVar[tuple[Arm, ...]]
    measures: ClassVar[tuple[Measure, ...]]

    @abstractmethod
    def trial(self, arm: str, seed: int, candidate: Any = None) -> Trial:
        """Run one arm with one seed (and one of the arm's candidates): the same arguments give the same values."""

    @abstractmethod
    def judge(self, results: Results) -> Sequence[Check]:
        """The claim, part by part. It holds if every part does; thresholds come from the specification, never from the run."""

    def figures(self, results: Results) -> Mapping[str, str]:
        """{file name: SVG text}; every measure of every arm with its seeds unless overridden."""
        from polytask.recipes.figure import dots

        return {"measures.svg": dots(results, self.arms, title=self.info.name)}

    @property
    def options(self) -> dict[str, Any]:
        """The options of this run."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def quickened(self) -> Self:
        """The same recipe with the options of a quick look."""
        return replace(self, **self.info.quick)  # type: ignore[type-var]

    def run(
        self,
        seeds: int | Sequence[int] | None = None,
        quick: bool = False,
        out: Path | str | None = None,
        progress: Progress | None = None,
    ) -> Evidence:
        """Run every arm with every seed and judge the claim.

        Args:
            seeds: how many (0, 1, ...), or which; the recipe's own number when omitted (two for a quick look).
            quick: use the small settings: seconds instead of minutes. Such figures show that the recipe works, not that its claim holds.
            out: a new or empty folder that receives ``evidence.json``, ``evidence.md`` and the figures.
            progress: told of every finished trial.

        Raises:
            InputError: no seed, or a folder that holds something already.
            TrainingError: a measure that is not finite; the message names the arm and the seed.
        """
        chosen = _seeds(seeds, 2 if quick else self.info.seeds)
        folder = empty_folder(out)
        recipe = self.quickened() if quick else self
        started = time.perf_counter()
        results = Results(recipe._trials(chosen, progress), recipe.measures)
        checks = list(recipe.judge(results))
        evidence = Evidence(
            recipe=self.info.name,
            paper=self.info.paper,
            claim=self.info.claim,
            holds=all(check.holds for check in checks),
            seeds=list(chosen),
            rows=[_flat(row) for row in results.rows],
            reference=self.info.reference,
            domain=self.info.domain,
            quick=quick,
            options=recipe.options,
            arms=[{"name": a.name, "label": a.label, "role": a.role} for a in recipe.arms],
            measures=[asdict(m) for m in recipe.measures],
            summary=[
                {"arm": a.name, **{m.name: results.summary(a.name, m.name) for m in recipe.measures}}
                for a in recipe.arms
            ],
            checks=[asdict(check) for check in checks],
            seconds=time.perf_counter() - started,
        )
        if folder is not None:
            evidence.write(folder, recipe.figures(results))
        return evidence

    def _trials(self, seeds: Sequence[int], progress: Progress | None) -> list[Row]:
        total = len(seeds) * sum(max(1, len(arm.candidates)) for arm in self.arms)
        done = 0
        rows = []
        for seed in seeds:
            for arm in self.arms:
                runs = []
                for candidate in arm.candidates or (None,):
                    trial = self.trial(arm.name, seed, candidate)
                    _require_complete(trial, self.measures, arm, seed)
                    runs.append(Row(arm.name, seed, candidate, trial))
                    done += 1
                    if progress is not None:
                        progress(f"{arm.label}, seed {seed}", done, total)
                rows.append(_selected(runs, arm))
        return rows


def _seeds(seeds: int | Sequence[int] | None, default: int) -> tuple[int, ...]:
    chosen = (
        tuple(range(seeds if isinstance(seeds, int) else default))
        if seeds is None or isinstance(seeds, int)
        else tuple(seeds)
    )
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"a recipe needs at least one seed, each of them once, not {list(chosen)}")
    return chosen


def empty_folder(out: Path | str | None) -> Path | None:
    """The folder to be written, known to hold nothing yet.

    Raises:
        InputError: it is a file, or holds something.
    """
    if out is None:
        return None
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already and is not an empty folder: name another one")
    return folder


def _require_complete(trial: Trial, measures: Sequence[Measure], arm: Arm, seed: int) -> None:
    import math

    for measure in measures:
        value = trial.values.get(measure.name)
        if value is None or not math.isfinite(value):
            raise TrainingError(f"{arm.label} with seed {seed} ended with {measure.name} = {value}")


def _selected(runs: Sequence[Row], arm: Arm) -> Row:
    if len(runs) == 1:
        return runs[0]
    if any(run.trial.selection is None for run in runs):
        raise TrainingError(
            f"{arm.label} has candidates to choose from, but its trials say nothing about validation data"
        )
    return min(runs, key=lambda run: run.trial.selection if run.trial.selection is not None else float("inf"))


def _flat(row: Row) -> dict[str, Any]:
    chosen = {} if row.candidate is None else {"candidate": row.candidate}
    return {"arm": row.arm, "seed": row.seed, **chosen, **{name: float(v) for name, v in row.trial.values.items()}}

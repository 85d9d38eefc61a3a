"""The search of a study: what is trained in which order, and what the validation rows say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.training import groups as g
from polytask.training.jobs import Outcome, Workshop
from polytask.training.judging import Bench, Columns, Decoded, values_of
from polytask.training.protocol import (
    EQUAL,
    GROUPS,
    LOG_LOSSES,
    SCALARIZATION,
    SINGLE,
    Method,
    Settings,
    references,
    scalarization,
    trial_weights,
)
from polytask.training.study_table import StudyRows

Floats = npt.NDArray[np.float64]


class Search:
    """Trains the methods of a study and scores them on validation rows.

    Args:
        table: its validation labels are read, its test labels are not.
        settings: of the study.
        workshop: does the trainings.
        methods: the balancing methods to compare.

    Attributes:
        methods: all methods, once :meth:`run` is done.
        validation: {method: Delta_m over tasks on validation rows against the single-task references}.
        best: the method with the best validation score, single-task training included.
        chosen: the method to recommend.
        joint: what stands beside single-task training in tables: ``chosen``, or the best other one where that is
            single-task training itself.
        groupings: [{"groups", "validation_score"}], the best first.
        how: in words, how groups were looked for.
    """

    def __init__(self, table: StudyRows, settings: Settings, workshop: Workshop, methods: list[Method]) -> None:
        self.table, self.tasks, self.settings, self.workshop = table, table.tasks, settings, workshop
        self.names = list(table.tasks)
        self.labels = table.labels("validation")
        self.columns = Columns.of(table.tasks, self.labels)
        self.single, self.equal = references(len(self.names))
        self.asked = methods
        self.methods: list[Method] = []
        self.best = self.chosen = self.joint = self.single
        self.validation: dict[str, float] = {}
        self.groupings: list[dict[str, Any]] = []
        self.how = ""
        self._values: dict[tuple[str, int], Floats] = {}

    def run(self) -> None:
        """Train everything."""
        seeds, first = self.settings.seeds, self.settings.seeds[0]
        n = len(self.names)
        trials = [scalarization(w) for w in trial_weights(n, self.settings.trials, self.settings.split_seed)]
        jobs = [job for m in (self.single, self.equal, *self.asked) for s in seeds for job in m.jobs(s)]
        observed = self.equal.jobs(first)[0]
        self.workshop.do("references, trials and methods", [*jobs, *(t.jobs(first)[0] for t in trials)], observed)
        tuned = max(trials, key=lambda t: self.score(t, first))
        grouped = self._grouped(first)
        rest = [job for m in (tuned, *grouped) for s in seeds for job in m.jobs(s)]
        self.workshop.do("tuned scalarization and groups on all seeds", rest)
        self.methods = [self.single, self.equal, tuned, *self.asked, *grouped]
        judged = self.bench("validation")
        self.validation = {m.name: judged.delta_m(m.name, SINGLE)[0].mean for m in self.methods}
        self.best, self.chosen = self._choose(judged)
        together = [m for m in self.methods if m is not self.single]
        self.joint = max(together, key=self._score) if self.chosen is self.single else self.chosen

    def bench(self, part: str) -> Bench:
        """All methods judged on ``validation`` rows, or, once, on ``test`` rows."""
        seeds = self.settings.seeds
        clusters = self.table.clusters_of(part)
        found = Bench(self.tasks, self.table.labels(part), len(seeds), clusters, self.settings.split_seed)
        for method in self.methods:
            found.add(method.name, [self.decoded(method, s, part) for s in seeds])
        return found

    def _choose(self, judged: Bench) -> tuple[Method, Method]:
        """The method with the best validation score, and the choice.

        The choice is the simplest method within one standard error of the best (Breiman et al. 1984): the best of many
        noisy scores is too good to be true. One network for all tasks is simpler than several, and all apart the least simple.
        """
        best = max(self.methods, key=self._score)
        for method in sorted(self.methods, key=_complexity):
            lead = judged.delta_m_samples(best.name, SINGLE) - judged.delta_m_samples(method.name, SINGLE)
            if self.validation[best.name] - self.validation[method.name] <= np.nanstd(lead):
                return best, method
        return best, best

    def _score(self, method: Method) -> float:
        return self.validation[method.name]

    @property
    def tuned_weights(self) -> tuple[float, ...]:
        """The weights of the tuned scalarization."""
        tuned = next(m for m in self.methods if m.name == SCALARIZATION)
        return tuple(dict(tuned.options).get("preference", (1.0,) * len(self.names)))

    def outcomes(self, method: Method, seed: int) -> list[Outcome]:
        """The trainings of a method, one a group."""
        return [self.workshop[job] for job in method.jobs(seed)]

    def decoded(self, method: Method, seed: int, part: str) -> Decoded:
        """Decoded outputs of all tasks on ``validation`` or ``test`` rows."""
        found: dict[str, Any] = {}
        for outcome in self.outcomes(method, seed):
            found |= getattr(outcome, part)
        return found

    def values(self, method: Method, seed: int) -> Floats:
        """Every metric on validation rows, shape (columns,)."""
        key = ("+".join(job.name for job in method.jobs(seed)), seed)
        if key not in self._values:
            self._values[key] = values_of(self.tasks, self.labels, self.decoded(method, seed, "validation"))
        return self._values[key]

    def score(self, method: Method, seed: int) -> float:
        """Delta_m over tasks on validation rows against the single-task models of the same seed."""
        over_tasks, _ = self.columns.delta_m(self.values(method, seed), self.values(self.single, seed))
        return float(over_tasks) if np.isfinite(over_tasks) else float("-inf")

    def gains(self, method: Method, seed: int) -> dict[int, float]:
        """{task: gain in percent over its single-task model on validation rows}; 0 where no metric tells."""
        found = self.columns.gain_by_task(self.values(method, seed), self.values(self.single, seed))
        return {k: float(v) for k, v in enumerate(np.nan_to_num(found))}

    def _grouped(self, seed: int) -> list[Method]:
        """The best grouping as a method, where it is neither all together nor all apart."""
        n = len(self.names)
        whole, apart = (tuple(range(n)),), tuple((k,) for k in range(n))
        together = self.gains(self.equal, seed)
        hurt = [self.names[k] for k, gain in together.items() if gain < 0]
        gains: dict[g.Group, Mapping[int, float]] = {whole[0]: together}
        options: list[g.Grouping] = [whole, apart]
        reason = ""
        if n == 2:
            reason = "two tasks can only be learnt together or apart"
        elif not self.settings.grouping:
            reason = "groups were not asked for: together and apart were scored on validation rows"
        elif not hurt:
            reason = "no task lost by learning all together on validation rows (equal weights, first seed), so no group was tried"
        else:
            cosine = self._cosine(seed)
            trained = {
                group: self._method((group, *((k,) for k in range(n) if k not in group)))
                for group in g.groups_to_train(n, cosine)
            }
            self.workshop.do("groups of tasks", [job for m in trained.values() for job in m.jobs(seed)])
            for group, method in trained.items():
                found = self.gains(method, seed)
                gains[group] = {k: found[k] for k in group}
            options = g.candidates(n, cosine)
            reason = (
                f"{', '.join(hurt)} lost by learning all together with equal weights on validation rows: {g.how(n)}"
            )
        scored = sorted(
            ((g.gain_of(grouping, gains), grouping) for grouping in options), key=lambda p: (-p[0], len(p[1]), p[1])
        )
        self.groupings = [
            {"groups": [[self.names[k] for k in group] for group in grouping], "validation_score": s}
            for s, grouping in scored
        ]
        self.how = reason
        best = scored[0][1]
        return [] if best in (whole, apart) else [self._method(best)]

    def _method(self, grouping: g.Grouping) -> Method:
        grouping = tuple(sorted(grouping))
        shown = " | ".join(" + ".join(self.names[k] for k in group) for group in grouping)
        why = f"the best grouping on validation rows: {shown}"
        return Method(GROUPS, "Groups of tasks", "method", grouping, EQUAL, (), why)

    def _cosine(self, seed: int) -> Floats | None:
        seen = self.workshop[self.equal.jobs(seed)[0]].history.get("interference")
        if not seen or not seen.get("cosine"):
            return None
        return np.asarray(np.nan_to_num(np.array(seen["cosine"], dtype=np.float64)).mean(0))


def _complexity(method: Method) -> int:
    """Sums of losses first, then methods in the order asked, then groups, then a network for each task."""
    order = (EQUAL, LOG_LOSSES, SCALARIZATION)
    last = {GROUPS: len(order) + 1, SINGLE: len(order) + 2}
    return order.index(method.name) if method.name in order else last.get(method.name, len(order))

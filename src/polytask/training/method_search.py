"""The search of a benchmark of methods: each is tried as often as any other, the best trial goes on to all seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from polytask.errors import InputError, TrainingError
from polytask.training.jobs import Workshop
from polytask.training.protocol import SINGLE, Method, Settings, scalarization, trial_weights
from polytask.training.search import Search
from polytask.training.study_table import StudyRows


def learning_rates(trials: int) -> list[float]:
    """What the learning rate is multiplied by in each trial: 1, then half a power of ten down and up, a whole one, ..."""
    return [10.0 ** ((-1) ** i * ((i + 1) // 2) / 2) for i in range(trials)]


class MethodSearch(Search):
    """Trains many methods, each with the same number of trials.

    The trials of the tuned scalarization are weights, those of every other row learning rates, single-task training and equal
    weighting included: no row is tuned more than another. Trials are trained on the first seed and told apart on validation rows.

    Args:
        table: its validation labels are read, its test labels are not.
        settings: of the benchmark.
        workshop: does the trainings.
        methods: the balancing methods to compare.

    Attributes:
        failed: {method: why it could not be trained}.
    """

    def __init__(self, table: StudyRows, settings: Settings, workshop: Workshop, methods: list[Method]) -> None:
        super().__init__(table, settings, workshop, methods)
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Train everything; a method that diverges is left out, with its reason."""
        n, seed = len(self.names), self.settings.split_seed
        self.single = self.best = self.chosen = self.joint = self._tuned(_at_rates(self.single, self.settings))
        self.equal = self._tuned(_at_rates(self.equal, self.settings))
        tuned = self._tuned([scalarization(w) for w in trial_weights(n, self.settings.trials, seed)])
        self.methods = [self.single, self.equal, tuned]
        for method in self.asked:
            try:
                self.methods.append(self._at_some_level(method))
            except (InputError, TrainingError) as error:
                self.failed[method.name] = str(error)
        judged = self.bench("validation")
        self.validation = {m.name: judged.delta_m(m.name, SINGLE)[0].mean for m in self.methods}
        self.best, self.chosen = self._choose(judged)
        self.joint = max(self.methods[1:], key=self._score) if self.chosen is self.single else self.chosen

    def _at_some_level(self, method: Method) -> Method:
        """The method at the level the loop prefers, or at the parameters where it refuses the representation."""
        try:
            return self._tuned(_at_rates(method, self.settings))
        except InputError:
            return self._tuned(_at_rates(replace(method, level="exact"), self.settings))

    def _tuned(self, trials: Sequence[Method]) -> Method:
        """The best of the trials on the first seed, trained on all seeds."""
        first = self.settings.seeds[0]
        self.workshop.do(f"{trials[0].label}: trials", [job for t in trials for job in t.jobs(first)])
        if trials[0].name == SINGLE:
            self.single = trials[0]  # the scale on which its own trials are compared
        best = max(trials, key=lambda t: self.score(t, first))
        self.workshop.do(f"{best.label}: all seeds", [job for s in self.settings.seeds for job in best.jobs(s)])
        return best


def _at_rates(method: Method, settings: Settings) -> list[Method]:
    return [replace(method, rate=rate) for rate in learning_rates(settings.trials)]

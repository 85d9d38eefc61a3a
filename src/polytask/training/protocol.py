"""What a study does before it has seen a single result: one budget, its methods and why, its trials, its trainings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from polytask.balancing.presets import resolve
from polytask.errors import InputError
from polytask.training.config import TrainConfig

SINGLE, EQUAL, SCALARIZATION, LOG_LOSSES, GROUPS = "single_task", "equal", "scalarization", "log_losses", "groups"
WIDEST_WEIGHTS = 5.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a study on a given table; stored in ``config.yaml``.

    Args:
        targets: the target columns.
        kinds: {target: kind} where it is told rather than inferred.
        fractions: shares of training, validation and test rows.
        by: a column whose groups are never cut by the split, and which is no feature.
        by_time: a column to split by: the latest rows are the test.
        ignore: columns that are neither features nor targets.
        balance: names of balancing methods; ``("auto",)`` chooses.
        short: whether ``auto`` takes only the cheapest method.
        seeds: of initial weights and the order of rows; the split has its own, ``split_seed``.
        split_seed: of the split into training, validation and test rows.
        trials: weight vectors tried for the tuned scalarization, equal weights included.
        grouping: whether groups of tasks are searched where learning all together hurts.
        model: options of :func:`polytask.models.tabular.tabular_model`.
        training: settings of :class:`~polytask.training.config.TrainConfig`, the same for every training.

    Raises:
        InputError: a setting out of its range.
    """

    targets: tuple[str, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    by: str | None = None
    by_time: str | None = None
    ignore: tuple[str, ...] = ()
    balance: tuple[str, ...] = ("auto",)
    short: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int = 0
    trials: int = 5
    grouping: bool = True
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("targets", "fractions", "ignore", "balance", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.targets) < 2:
            which = f"only {self.targets[0]!r} was given" if self.targets else "none was given"
            raise InputError(f"a study asks whether several targets should be learnt together, and {which}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"a study needs at least one seed, each given once, not {list(self.seeds)}")
        if self.trials < 1:
            raise InputError(f"trials must be at least 1 (equal weights), not {self.trials}")
        TrainConfig.from_json(dict(self.training))

    @property
    def config(self) -> TrainConfig:
        """How every model of the study is trained."""
        return TrainConfig.from_json(dict(self.training))

    def to_json(self) -> dict[str, Any]:
        """All settings, JSON- and YAML-ready."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**plain, "training": self.config.to_json(), "kinds": dict(self.kinds), "model": dict(self.model)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Settings:
        """Read back what :meth:`to_json` wrote.

        Raises:
            InputError: a setting that does not exist.
        """
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            raise InputError(f"a study has no setting {unknown[0]!r}")
        return cls(**settings)


@dataclass(frozen=True)
class Job:
    """One training: which tasks, balanced how, from which seed, at which multiple of the learning rate, with gradients from where.

    Equal jobs have equal names and are trained once.
    """

    tasks: tuple[int, ...]
    balancer: str
    options: tuple[tuple[str, Any], ...]
    seed: int
    rate: float = 1.0
    level: str = "auto"

    @property
    def name(self) -> str:
        """A folder's name that tells jobs apart."""
        parts = [self.balancer, "-".join(map(str, self.tasks))]
        for option, value in self.options:
            shown = "-".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else str(value)
            parts.append(f"{option}-{shown}")
        if self.rate != 1:
            parts.append(f"rate-{self.rate:.4g}")
        if self.level != "auto":
            parts.append(f"level-{self.level}")
        return "_".join([*parts, f"seed-{self.seed}"])


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        name: as in ``results.json``.
        label: for people.
        role: ``reference``, ``baseline`` or ``method``.
        groups: which tasks share a model, by position.
        balancer: registered name of the balancing method.
        options: its options.
        why: why it is in the comparison.
        rate: what the learning rate is multiplied by.
        level: where gradients are taken.
    """

    name: str
    label: str
    role: str
    groups: tuple[tuple[int, ...], ...]
    balancer: str = EQUAL
    options: tuple[tuple[str, Any], ...] = ()
    why: str = ""
    rate: float = 1.0
    level: str = "auto"

    def jobs(self, seed: int) -> list[Job]:
        """The trainings that make the method for one seed, one a group."""
        return [
            alone(g[0], seed, self.rate)
            if len(g) == 1
            else Job(g, self.balancer, self.options, seed, self.rate, self.level)
            for g in self.groups
        ]


def alone(task: int, seed: int, rate: float = 1.0) -> Job:
    """The single-task reference of a task: the same architecture with one head."""
    return Job((task,), EQUAL, (), seed, rate)


def references(n_tasks: int) -> list[Method]:
    """What stands beside every method: single-task models and equal weighting."""
    everyone = tuple(range(n_tasks))
    return [
        Method(
            SINGLE,
            "Single-task models",
            "reference",
            tuple((k,) for k in everyone),
            why="what joint training must beat",
        ),
        Method(
            EQUAL, "Equal weighting", "baseline", (everyone,), why="the sum of the losses, the bar for every method"
        ),
    ]


def trial_weights(n_tasks: int, trials: int, seed: int) -> list[tuple[float, ...]]:
    """The weight vectors tried for the tuned scalarization.

    Equal weights first; the others log-uniform between 1/5 and 5, scaled to sum to the number of tasks and rounded to four digits
    (so that they read the same from ``results.json``).
    """
    rng = np.random.default_rng([seed, n_tasks])
    spread = np.log(WIDEST_WEIGHTS)
    drawn = np.exp(rng.uniform(-spread, spread, (trials - 1, n_tasks)))
    return [(1.0,) * n_tasks, *(tuple(float(f"{w:.4g}") for w in row * n_tasks / row.sum()) for row in drawn)]


def scalarization(weights: Sequence[float]) -> Method:
    """A fixed weighted sum of the losses."""
    everyone = tuple(range(len(weights)))
    equal = len(set(weights)) == 1
    options = () if equal else (("preference", tuple(weights)),)
    why = "static weights tuned on validation rows: what a balancing method must beat"
    return Method(SCALARIZATION, "Tuned scalarization", "baseline", (everyone,), EQUAL, options, why)


AUTO = (
    (LOG_LOSSES, "the sum of log losses weighs tasks by relative progress, needs no tuning and costs nothing"),
    ("famo", "keeps relative progress even with loss values only, at the cost of one extra forward pass"),
    ("db_mtl", "brings losses and gradients to one scale, at the cost of gradients at the shared representation"),
)


def balancing_methods(balance: Sequence[str], n_tasks: int, *, short: bool = False) -> list[Method]:
    """The balancing methods of a study.

    Args:
        balance: registered names or aliases, ``log_losses``, or ``auto``: the sum of log losses, FAMO and DB-MTL, cheapest first,
            because tuned weights and log losses reach what costlier methods reach more often than not
            (Kurin et al. 2022, arXiv:2201.04122; Xin et al. 2022, arXiv:2209.11379; Lin et al. 2023, arXiv:2308.12029).
        n_tasks: how many tasks there are.
        short: whether only the cheapest of the automatic choice is taken.

    Raises:
        InputError: an unknown name.
    """
    everyone = (tuple(range(n_tasks)),)
    found: dict[str, Method] = {}
    automatic = dict(AUTO[:1] if short else AUTO)
    for name in (n for asked in balance for n in (automatic if asked == "auto" else (asked,))):
        if name == LOG_LOSSES:
            found[name] = Method(
                name,
                "Sum of log losses",
                "method",
                everyone,
                EQUAL,
                (("log_losses", True),),
                automatic.get(name, "asked for"),
            )
            continue
        entry, options = resolve(name)
        if entry.name == EQUAL and not options:  # always there
            continue
        if options:  # LOG_X, or another library's name of a variant
            key, label = name.lower().replace("-", "_"), f"{_label(entry.factory, entry.name)} ({name})"
        else:
            key, label = entry.name, _label(entry.factory, entry.name)
        why = automatic.get(name, "asked for")
        found[key] = Method(key, label, "method", everyone, entry.name, tuple(options.items()), why)
    return list(found.values())


def _label(factory: Any, name: str) -> str:
    """The method's name as its authors write it, with which its module begins."""
    title = re.split(r"[(:;.]| by ", inspect.getdoc(inspect.getmodule(factory)) or "")[0].strip()
    return title if 0 < len(title) <= 30 else name.replace("_", " ")


def budget_text(settings: Settings, methods: int) -> str:
    """The budget in one sentence."""
    config = settings.config
    stop = f", stopped after {config.patience} without a better validation score" if config.patience else ""
    seeds = "1 seed" if len(settings.seeds) == 1 else f"{len(settings.seeds)} seeds"
    return (
        f"Every training has the same network, optimizer and at most {config.epochs} epochs{stop}; every method has {seeds}; the tuned "
        f"scalarization alone has {settings.trials} trials, on the first seed; balancing methods ({methods}) keep their "
        "published defaults."
    )

r"""Intervals over seeds and test rows at once: the hierarchical, paired bootstrap.

Two things would differ if a study were repeated: the test rows, and the random seeds of training. Each bootstrap
sample draws rows (the same ones for every method, task and seed, which pairs all differences) and, above them, seeds. With only
S seeds, drawing S of S understates their variance by the factor (S - 1) / S; deviations from the mean over seeds are
therefore stretched by :math:`\sqrt{S / (S - 1)}` (Rao & Wu, JASA 1988). With one seed the interval speaks of test rows
only.

Sources: Efron & Tibshirani 1993 (percentile interval); Davison & Hinkley 1997, section 3.8 (hierarchical data).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST = 1000
FEWEST = 200
CELLS = 8_000_000  # replicates times rows: keeps one metric's replicates under about 0.1 s


@dataclass(frozen=True)
class Interval:
    """A value and the interval that holds the middle ``level`` of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is certain at the interval's level."""
        return bool(self.low > 0 or self.high < 0)

    def to_json(self) -> dict[str, float | None]:
        """A JSON-ready dict; undefined numbers become None."""
        return {k: (float(v) if np.isfinite(v) else None) for k, v in vars(self).items()}


def affordable_replicates(rows: int) -> int:
    """How many bootstrap samples to draw for this many rows: 1000 for small tables, never under 200."""
    return int(np.clip(CELLS // max(rows, 1), FEWEST, MOST))


def draw_seeds(n_seeds: int, replicates: int, *, seed: int) -> Floats:
    """Weights of the seeds in each bootstrap sample, shape (replicates, seeds), each row summing to 1.

    Args:
        n_seeds: S; with one seed all weights are 1.
        replicates: number of samples.
        seed: of the draw.
    """
    if n_seeds == 1:
        return np.ones((replicates, 1))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=replicates) / n_seeds
    stretch = np.sqrt(n_seeds / (n_seeds - 1))
    return np.asarray(1 / n_seeds + stretch * (drawn - 1 / n_seeds))


def over_seeds(by_seed: Floats, weights: Floats) -> Floats:
    """Combine the replicates of each seed into replicates of the mean over seeds.

    Args:
        by_seed: shape (seeds, replicates, ...).
        weights: from :func:`draw_seeds`, shape (replicates, seeds).

    Returns:
        Shape (replicates, ...).
    """
    return np.asarray(np.einsum("bs,sb...->b...", weights, by_seed))


def interval(mean: float, replicates: Floats, level: float = 0.95) -> Interval:
    """The percentile interval of replicates around a value, undefined replicates left out.

    Args:
        mean: the value on the data as they are.
        replicates: shape (replicates,).
        level: share of the replicates inside.
    """
    kept = replicates[np.isfinite(replicates)]
    if not len(kept):
        return Interval(mean, float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))

"""What a benchmark of many methods can tell apart: every method against the baselines and the best, all intervals at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from polytask.metrics import Interval, simultaneous_intervals
from polytask.training.judging import Bench
from polytask.training.protocol import EQUAL, SCALARIZATION, SINGLE


@dataclass(frozen=True)
class Comparison:
    """Differences of Delta_m over tasks on test rows, in percentage points, with intervals that hold for all methods at once.

    Attributes:
        best: the method with the highest Delta_m on test rows, which is too good to be true of any one method.
        against: {baseline or best: {method: {"mean", "low", "high"}}}, method minus baseline.
        sentences: what that means, in words.
    """

    best: str
    against: dict[str, dict[str, dict[str, float | None]]]
    sentences: list[str]


def compare(bench: Bench, labels: Mapping[str, str]) -> Comparison:
    """Compare every method with single-task training, equal weighting, the tuned scalarization and the best.

    Args:
        bench: with all methods judged on test rows.
        labels: {method: label}.
    """
    means = {m: float(bench.columns.delta_m(v, bench.values[SINGLE])[0]) for m, v in bench.values.items()}
    best = max(means, key=lambda m: means[m] if np.isfinite(means[m]) else -np.inf)
    found = {b: differences(bench, means, b) for b in dict.fromkeys((SINGLE, EQUAL, SCALARIZATION, best))}
    words = [sentence(found[b], labels[b], labels) for b in (SINGLE, EQUAL, SCALARIZATION)]
    level = sum(i.high >= 0 for i in found[best].values())
    if level:
        words.append(
            f"Of the other {len(found[best])} rows, {level} cannot be told from the best on these test rows ({labels[best]}): "
            "a ranking among them is a ranking of noise."
        )
    plain = {b: {m: i.to_json() for m, i in of.items()} for b, of in found.items()}
    return Comparison(best, plain, words)


def differences(bench: Bench, means: Mapping[str, float], baseline: str) -> dict[str, Interval]:
    """{method: Delta_m minus the baseline's}, for all methods but the baseline."""
    others = [m for m in means if m != baseline]
    reference = bench.delta_m_samples(baseline, SINGLE)
    samples = np.stack([bench.delta_m_samples(m, SINGLE) - reference for m in others], axis=1)
    return dict(zip(others, simultaneous_intervals([means[m] - means[baseline] for m in others], samples), strict=True))


def sentence(found: Mapping[str, Interval], baseline: str, labels: Mapping[str, str]) -> str:
    """Which methods are better and worse than a baseline, and that the others cannot be told from it."""
    better = [labels[m] for m, i in found.items() if i.low > 0]
    worse = [labels[m] for m, i in found.items() if i.high < 0]
    rest = len(found) - len(better) - len(worse)
    parts = [f"{word} than it: {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    told = f"; {'; '.join(parts)}" if parts else ""
    return f"Against {baseline}, {rest} of {len(found)} rows cannot be told apart at 95 % for all comparisons at once{told}."

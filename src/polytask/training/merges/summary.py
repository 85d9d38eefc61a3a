"""From which rows each candidate gets right to what may be said of it: accuracies, their intervals, what is told apart and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import polytask
from polytask.metrics.bootstrap import Interval, affordable_replicates, draw_seeds, interval, over_seeds
from polytask.training.merges.candidates import BASE, BASELINE, EXPERTS, Candidate
from polytask.training.merges.lineage import MergeTask

if TYPE_CHECKING:
    from polytask.merging.interference import Interference
    from polytask.training.merges.compare import Judged

Floats = npt.NDArray[np.float64]
SCHEMA = 1
ONE_MODEL = ("method", "baseline")
"""Roles of candidates that give one model of the base's size; others are judged beside them, not among them."""

COMMON = (BASELINE, "average")
"""What methods may come to on a model that has little of what they are defined on."""

MOST = 3
"""Names in a sentence of the verdict."""


class Replicates:
    """Accuracies of all candidates in bootstrap samples of the test rows and the seeds.

    Args:
        hits: {task: which rows are right, shape (candidates, seeds, rows)}; every sample draws the same rows for all.
    """

    def __init__(self, hits: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        first = next(iter(hits.values()))
        count = affordable_replicates(max(h.shape[2] for h in hits.values()))
        rng, weights = np.random.default_rng(0), draw_seeds(first.shape[1], count, seed=0)
        self.plain: dict[str, Floats] = {}
        self.drawn: dict[str, Floats] = {}
        self.by_seed: dict[str, Floats] = {}
        for task, h in hits.items():
            rows = h.shape[2]
            times = rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float32)
            by_seed = np.einsum("bn,csn->sbc", times, h.astype(np.float32), optimize=True) / rows
            self.by_seed[task] = h.mean(2)
            self.plain[task] = h.mean((1, 2))
            self.drawn[task] = over_seeds(by_seed.astype(np.float64), weights)

    def accuracy(self, task: str, i: int) -> Interval:
        """Of candidate i on a task."""
        return interval(float(self.plain[task][i]), self.drawn[task][:, i])

    def mean(self, i: int) -> Interval:
        """Mean accuracy of candidate i over the tasks."""
        return interval(
            fmean(float(p[i]) for p in self.plain.values()), np.mean([d[:, i] for d in self.drawn.values()], 0)
        )

    def normalised(self, i: int, expert: int) -> tuple[float, Floats]:
        """Mean over the tasks of candidate i's accuracy relative to the experts': the value, and a sample each, shape (samples,)."""
        plain = fmean(float(p[i] / p[expert]) for p in self.plain.values())
        with np.errstate(divide="ignore", invalid="ignore"):
            return plain, np.mean([d[:, i] / d[:, expert] for d in self.drawn.values()], 0)

    def difference(self, i: int, j: int, expert: int) -> Interval:
        """Of the normalised accuracies of candidates i and j, on the same samples."""
        (a, drawn_a), (b, drawn_b) = self.normalised(i, expert), self.normalised(j, expert)
        return interval(a - b, drawn_a - drawn_b)

    def difference_by_seed(self, i: int, j: int, expert: int) -> list[float | None]:
        """The same within each seed, relative to its own experts; None where one of them gets no row right."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.mean([(a[i] - a[j]) / a[expert] for a in self.by_seed.values()], 0)
        return [float(x) if np.isfinite(x) else None for x in found]


def summary(
    tasks: Sequence[MergeTask],
    candidates: Sequence[Candidate],
    judged: Mapping[str, Sequence[Judged]],
    found: Sequence[Interference],
    budget: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The results of a comparison, JSON-ready: what ``results.json`` holds."""
    names = [c.name for c in candidates]
    hits = {t.name: np.stack([np.stack([j.test[t.name] for j in judged[n]]) for n in names]) for t in tasks}
    drawn = Replicates(hits)
    expert, baseline = names.index(EXPERTS), names.index(BASELINE)
    same, rows = _same(names, [c.role for c in candidates], hits), []
    for i, c in enumerate(candidates):
        records = [j.record for j in judged[c.name]]
        rows.append(
            {
                "name": c.name,
                "label": c.label or c.name,
                "role": c.role,
                "accuracy": {t.name: drawn.accuracy(t.name, i).to_json() for t in tasks},
                "mean_accuracy": drawn.mean(i).to_json(),
                "normalised": interval(*drawn.normalised(i, expert)).to_json(),
                "difference": drawn.difference(i, baseline, expert).to_json(),
                "difference_by_seed": drawn.difference_by_seed(i, baseline, expert),
                "same_as": same.get(c.name),
                "validation_score": fmean(r["score"] for r in records),
                "chosen": [r["options"] for r in records],
                "trials": max(len(r["tried"]) for r in records),
                "tried": [r["tried"] for r in records],
                **_cost(records),
            }
        )
    return {
        "polytask": polytask.__version__,
        "kind": "merge comparison",
        "schema": SCHEMA,
        "budget": dict(budget),
        "lineages": _lineages([names.index(n) for n in (EXPERTS, BASE, BASELINE)], hits),
        "tasks": [{"name": t.name, "validation": len(t.validation), "test": len(t.test)} for t in tasks],
        "candidates": rows,
        "left_out": [{"name": n, "reason": why} for n, why in left_out.items()],
        "verdict": _verdict(rows, drawn, names),
        "interference": _interference(found),
    }


def _cost(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    peaks = [r["peak_bytes"] for r in records]
    return {
        "seconds": fmean(r["seconds"] for r in records),
        "statistic_seconds": fmean(r["statistic_seconds"] for r in records),
        "search_seconds": fmean(sum(t["seconds"] for t in r["tried"]) for r in records),
        "peak_bytes": None if None in peaks else max(peaks),
    }


def _same(names: Sequence[str], roles: Sequence[str], hits: Mapping[str, npt.NDArray[np.uint8]]) -> dict[str, str]:
    """{method: the common one that is right on the same test rows in every seed}."""
    common = [(n, names.index(n)) for n in COMMON if n in names]
    found: dict[str, str] = {}
    for i, (name, role) in enumerate(zip(names, roles, strict=True)):
        twin = next((n for n, j in common if all(np.array_equal(h[i], h[j]) for h in hits.values())), name)
        if role == "method" and twin != name:
            found[name] = twin
    return found


def _lineages(indices: Sequence[int], hits: Mapping[str, npt.NDArray[np.uint8]]) -> int:
    """How many seeds differ in what is drawn by no method: the others are draws of random methods on a lineage seen before."""
    seeds = next(iter(hits.values())).shape[1]
    return len({b"".join(h[indices, s].tobytes() for h in hits.values()) for s in range(seeds)})


def _verdict(rows: Sequence[Mapping[str, Any]], drawn: Replicates, names: Sequence[str]) -> dict[str, Any]:
    """The method giving one model that validation chose, how it does on test rows, and which methods cannot be told from it there."""
    expert, baseline = names.index(EXPERTS), names.index(BASELINE)
    methods = [i for i, row in enumerate(rows) if row["role"] in ONE_MODEL]
    methods.sort(key=lambda i: -rows[i]["normalised"]["mean"])
    chosen = max(sorted(methods), key=lambda i: rows[i]["validation_score"])
    behind = {i: drawn.difference(chosen, i, expert) for i in methods if i != chosen}
    alike = [i for i, d in behind.items() if not d.excludes_zero]
    ahead = [i for i, d in behind.items() if d.high < 0]
    above = [i for i in methods if (rows[i]["difference"]["low"] or 0) > 0]
    over, over_base = (drawn.difference(chosen, j, expert) for j in (baseline, names.index(BASE)))
    twin = rows[chosen]["same_as"]
    # what gives another's test results is counted with it
    others = [i for i in behind if rows[i]["same_as"] is None and names[i] != twin]
    labels = {i: str(rows[i]["label"]) for i in others}
    said = [
        _sentence(rows[chosen], over, chosen == baseline),
        *([f"Its test results are those of {twin}, row for row."] if twin else []),
        _beside_base(over_base),
        *_others([labels[i] for i in alike if i in labels], [labels[i] for i in ahead if i in labels], len(others)),
        *_above([labels[i] for i in above if i in labels], len({*others, chosen} - {baseline})),
        *_larger([row for row in rows if row["role"] not in (*ONE_MODEL, "reference")]),
    ]
    return {
        "method": names[chosen],
        "over_baseline": over.to_json(),
        "over_base": over_base.to_json(),
        "alike": [names[i] for i in sorted(alike)],
        "ahead": [names[i] for i in sorted(ahead)],
        "above": [names[i] for i in sorted(above)],
        "text": " ".join(said),
    }


def _larger(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    best_first = sorted(rows, key=lambda row: -row["normalised"]["mean"])
    said = [f"{row['label']} ({row['role']}) keeps {100 * row['normalised']['mean']:.1f} %" for row in best_first]
    return [f"Larger than one model: {', '.join(said)}."] if said else []


def _sentence(row: Mapping[str, Any], over: Interval, is_baseline: bool) -> str:
    kept = (
        f"{row['label']}, chosen on validation, keeps {100 * row['normalised']['mean']:.1f} % of the experts' accuracy"
    )
    if not is_baseline:
        word = ("more" if over.mean > 0 else "less") if over.excludes_zero else "not clearly other"
        kept += f", {word} than tuned task arithmetic ({_points(over)})"
    return kept + "."


def _beside_base(over: Interval) -> str:
    """Whether merging was worth it at all."""
    if not over.excludes_zero:
        return f"It cannot be told from the base with the experts' heads ({_points(over)}): merging has not clearly gained anything."
    return f"Against the base with the experts' heads: {_points(over)}."


def _points(over: Interval) -> str:
    return f"{100 * over.mean:+.1f} points [{100 * over.low:+.1f}, {100 * over.high:+.1f}]"


def _others(alike: Sequence[str], ahead: Sequence[str], count: int) -> list[str]:
    """Of the other methods that give one model, the best on test rows first, how many are not below the chosen one."""
    if not count:
        return []
    said = [f"{len(ahead)} did better on test rows ({_first(ahead)})"] if ahead else []
    if alike:
        said.append(f"{len(alike)} {'is' if len(alike) == 1 else 'are'} not told from it ({_first(alike)})")
    which = "1 other method that gives" if count == 1 else f"{count} other methods that give"
    return [f"Of {which} one model, {' and '.join(said) or 'none is as good on test rows'}."]


def _first(labels: Sequence[str]) -> str:
    return f"{'best there: ' if len(labels) > MOST else ''}{', '.join(labels[:MOST])}"


def _above(labels: Sequence[str], count: int) -> list[str]:
    """Which other methods beat task arithmetic on test rows, and how many of so many would seem to if none did."""
    if not labels:
        return []
    named = 2 * MOST
    more = f" and {len(labels) - named} more" if len(labels) > named else ""
    return [
        f"Not chosen, but told above task arithmetic on test rows: {', '.join(labels[:named])}{more}; of {count} methods no better than "
        f"it, some 2.5 % ({0.025 * count:.1f}) would seem so by chance."
    ]


def _interference(found: Sequence[Interference]) -> dict[str, Any]:
    """Means over the seeds."""

    def mean(tensors: Sequence[Any]) -> Any:
        return np.mean([t.numpy() for t in tensors], 0).round(6).tolist()

    return {
        "tasks": list(found[0].names),
        "norm": mean([f.norm for f in found]),
        "cosine": mean([f.cosine for f in found]),
        "opposed": mean([f.opposed for f in found]),
        "overlap": mean([f.overlap for f in found]),
        "chance": fmean(f.chance for f in found),
    }

"""Compare ways of merging under one budget: options chosen on validation rows, test rows looked at once, every result kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import polytask
from polytask.errors import InputError, StorageError
from polytask.merging.interference import interference
from polytask.training.merges.candidates import EXPERTS, TRIALS, Candidate, in_order
from polytask.training.merges.footprint import Cost, measured
from polytask.training.merges.lineage import Lineage, MergeTask, Outcome, hits
from polytask.training.merges.summary import summary
from polytask.training.merges.systems import every_method

STORE, RESULTS = "candidates", "results.json"
PROXY_ROWS = 32

Hits = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Standing:
    """How far a comparison is.

    Attributes:
        done: candidates finished, over all seeds.
        total: of how many.
        candidate: which one is at work or has just finished.
        note: what it does, or what came of it.
    """

    done: int
    total: int
    candidate: str
    note: str


Progress = Callable[[Standing], None]


@dataclass(frozen=True)
class Judged:
    """A candidate's result for one seed: ``record`` is JSON-ready, ``test`` holds which test rows it gets right, by task."""

    record: dict[str, Any]
    test: Hits


def compare(
    tasks: Sequence[MergeTask],
    lineage: Lineage | Callable[[int], Lineage],
    candidates: Sequence[Candidate] | None = None,
    *,
    folder: Path,
    seeds: Sequence[int] = (0,),
    trials: int = TRIALS,
    proxy_rows: int = PROXY_ROWS,
    left_out: Mapping[str, str] = MappingProxyType({}),
    fingerprint: str | Callable[[int], str] = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge candidates on tasks, with the experts, the base and task arithmetic always among them.

    For every seed, every candidate's options are chosen by the mean over tasks of its validation accuracy relative to the expert's, with
    at most ``trials`` settings (of those that learn from labels, on the half they do not learn from); the chosen one alone is run on the
    test rows. What is finished lies in ``folder`` and is taken from there
    when the same comparison is started again. Intervals come from a bootstrap over test rows, the same ones for all candidates, and over
    seeds where there are several.

    Args:
        tasks: what is judged by.
        lineage: the base and the experts, or a function that gives them for a seed.
        candidates: see :func:`~polytask.training.merges.merged` and :class:`~polytask.training.merges.Candidate`; every registered
            merging method when omitted.
        folder: where results are kept and ``results.json`` is written.
        seeds: each is one lineage, or one draw of the random methods.
        trials: settings that each candidate of the registry may try.
        proxy_rows: inputs of each task that statistics are gathered on, of validation where the task has no proxy of its own; methods
            that learn from inputs are given all.
        left_out: methods that take no part, with the reason: they are named in the results.
        fingerprint: what else a stored result hangs on, such as the state of the files; perhaps by the seed.
        progress: told of every candidate that starts and finishes.

    Returns:
        What stands in ``results.json``; see docs/merge-compare.md.

    Raises:
        InputError: tasks and experts that do not fit, two candidates of one name.
        StorageError: the folder cannot be written.
    """
    if not tasks or not seeds or trials < 1 or proxy_rows < 1:
        raise InputError("a comparison takes at least one task, one seed, one trial and one proxy input")
    absent = dict(left_out)
    if candidates is None:
        candidates, absent = every_method(len(tasks), trials)
    everyone = in_order(candidates, len(tasks), trials)
    judged: dict[str, list[Judged]] = {c.name: [] for c in everyone}
    table, open_seed = _Table(tasks, folder), lineage if callable(lineage) else lambda _: lineage
    standing = Standing(0, len(everyone) * len(seeds), "", "")
    between = []
    for seed in seeds:
        line = _ready(open_seed(seed), tasks, seed, proxy_rows)
        table.fingerprint = f"{fingerprint(seed) if callable(fingerprint) else fingerprint}/{proxy_rows}"
        between.append(interference(line.base, line.experts, line.head))
        for candidate in [c for c in everyone if c.name not in absent]:
            standing = replace(standing, candidate=candidate.name)
            try:
                judged[candidate.name].append(table.judge(candidate, line, partial(_tell, progress, standing)))
            except InputError as error:
                if candidate.role == "reference":
                    raise
                absent[candidate.name] = str(error)
            standing = replace(standing, done=standing.done + 1)
    _tell(progress, replace(standing, done=standing.total, candidate=""), "done")
    kept = [c for c in everyone if c.name not in absent]
    budget = {"trials": trials, "proxy_rows": proxy_rows, "seeds": list(seeds)}
    results = summary(tasks, kept, judged, between, budget, absent)
    _write(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n")
    return results


def _tell(progress: Progress | None, standing: Standing, note: str) -> None:
    if progress is not None:
        progress(replace(standing, note=note))


def _ready(line: Lineage, tasks: Sequence[MergeTask], seed: int, proxy_rows: int) -> Lineage:
    missing = [t.name for t in tasks if t.name not in line.experts]
    if missing or len(line.experts) != len(tasks):
        raise InputError(
            f"every task has one expert: tasks are {', '.join(t.name for t in tasks)}, experts {', '.join(line.experts)}"
        )
    line.seed = seed
    for t in tasks:
        if not len(t.validation) or not len(t.test):
            raise InputError(f"the task {t.name} has no {'test' if len(t.validation) else 'validation'} rows")
    line.proxies = {t.name: (t.proxy or t.validation).rows(slice(proxy_rows)).inputs for t in tasks} | dict(
        line.proxies
    )
    line.unlabelled = {t.name: t.proxy or t.validation for t in tasks} | dict(line.unlabelled)
    line.labelled = {t.name: t.validation.rows(slice(halves(t))) for t in tasks} | dict(line.labelled)
    return line


def halves(task: MergeTask) -> int:
    """Where the validation rows end that methods may learn from by their labels."""
    return (len(task.validation) + 1) // 2


class _Table:
    """The results of a comparison, one file a candidate and seed."""

    def __init__(self, tasks: Sequence[MergeTask], folder: Path) -> None:
        self.tasks, self.folder, self.fingerprint = tasks, folder / STORE, ""
        self.experts: dict[str, float] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be written to: {(error.strerror or 'unknown reason').lower()}"
            ) from None

    def judge(self, candidate: Candidate, line: Lineage, note: Callable[[str], None]) -> Judged:
        """The stored result, or a new one that is stored."""
        file = self.folder / f"{candidate.name.replace('/', '_')}_seed-{line.seed}.safetensors"
        said = [candidate.name, candidate.axes, candidate.fixed, line.seed, self.fingerprint, polytask.__version__]
        said += ["labels"] * candidate.labels
        said += [[t.name, len(t.validation), len(t.test)] for t in self.tasks]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
        found = _read(file, digest)
        if found is None:
            found = self._run(candidate, line, note)
            _store(file, digest, found)
        if candidate.name == EXPERTS:
            self.experts = found.record["validation"]
            self._check_experts()
        return found

    def _check_experts(self) -> None:
        wrong = [n for n, share in self.experts.items() if not share]
        if wrong:
            raise InputError(
                f"the expert of the task {wrong[0]} gets no validation row right: nothing can be measured by it"
            )

    def _run(self, candidate: Candidate, line: Lineage, note: Callable[[str], None]) -> Judged:
        tried: list[dict[str, Any]] = []
        best: tuple[float, Outcome, dict[str, float], Cost] | None = None
        gathering = 0.0
        if candidate.statistic is not None:
            note(f"gathering: {candidate.statistic}")
            line.statistics(candidate.statistic)
            gathering = line.gathered[candidate.statistic][1]
        settings = Settings(candidate.axes)
        while (options := settings.next()) is not None:
            note(", ".join(f"{n} {v}" for n, v in options.items()))
            with measured() as cost:
                outcome = candidate.make(line, **candidate.fixed, **options)
            accuracy = self._accuracy(line, outcome, candidate.labels)
            reached = self._accuracy(line, line.experts, True) if candidate.labels else self.experts
            if candidate.name == EXPERTS:
                reached = accuracy
            score = float(np.mean([a / (reached.get(t) or a or 1.0) for t, a in accuracy.items()]))
            settings.tell(score)
            tried.append({"options": options, "score": score, "seconds": cost.seconds})
            if best is None or score > best[0]:
                best = score, outcome, accuracy, cost
        assert best is not None
        score, outcome, accuracy, cost = best
        test = {t.name: hits(line.model(t.name, outcome), t.name, t.test) for t in self.tasks}
        record = {
            "options": dict(candidate.fixed) | settings.best,
            "validation": accuracy,
            "score": score,
            "seconds": cost.seconds,
            "peak_bytes": cost.peak_bytes,
            "statistic_seconds": gathering,
            "tried": tried,
        }
        return Judged(record, test)

    def _accuracy(self, line: Lineage, outcome: Outcome, unseen: bool) -> dict[str, float]:
        """On validation rows, or on those alone that nothing was learned from."""
        found = {}
        for t in self.tasks:
            rows = t.validation.rows(slice(halves(t) if unseen else 0, None))
            found[t.name] = float(hits(line.model(t.name, outcome), t.name, rows).mean()) if len(rows) else 0.0
        return found


class Settings:
    """The settings of a search along one option after another.

    Args:
        axes: {option: values}; the first value holds until the option's turn comes, the best one from then on.
    """

    def __init__(self, axes: Mapping[str, Sequence[Any]]) -> None:
        self.best = {n: v[0] for n, v in axes.items()}
        self.waiting: list[tuple[str, Any]] = [(n, v) for n, values in axes.items() for v in values[1:]]
        self.asked: dict[str, Any] | None = None
        self.score = float("-inf")
        self.first = True

    def next(self) -> dict[str, Any] | None:
        """The next setting to try, None when all were tried."""
        if self.first:
            self.first, self.asked = False, dict(self.best)
        else:
            self.asked = self.best | dict([self.waiting.pop(0)]) if self.waiting else None
        return self.asked

    def tell(self, score: float) -> None:
        """What came of the setting asked for last; of equal ones the first stays."""
        assert self.asked is not None
        if score > self.score:
            self.best, self.score = self.asked, score


def _read(file: Path, digest: str) -> Judged | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            said = stored.metadata() or {}
            if said.get("digest") != digest:
                return None
            record: dict[str, Any] = json.loads(said["record"])
            return Judged(record, {n: stored.get_tensor(n).numpy() for n in stored.keys()})  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _store(file: Path, digest: str, judged: Judged) -> None:
    from safetensors.torch import save

    tensors = {n: torch.from_numpy(v) for n, v in judged.test.items()}
    _write(file, save(tensors, {"digest": digest, "record": json.dumps(judged.record)}))


def _write(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.partial")
    try:
        beside.write_bytes(content)
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"{file} cannot be written: {(error.strerror or 'unknown reason').lower()}") from None

"""What ``polytask bench steps`` runs: every method on every workload, in time and memory, as ratios to a plain step."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import polytask
from polytask.benchmark.contenders import OURS, Contender, Key, Level, Step, gather, plain
from polytask.benchmark.memory import peak_bytes
from polytask.benchmark.timing import Ratio, ratios
from polytask.benchmark.workload import Workload
from polytask.registry import methods

Told = Callable[[str, int, int], None]


def bench_steps(
    names: Sequence[str] = (),
    *,
    tasks: Sequence[int] = (3, 10, 40),
    trunks: Sequence[str] = ("mlp", "conv", "transformer"),
    levels: Sequence[Level] = ("auto",),
    beside: Sequence[Path] = (),
    rounds: int = 9,
    memory: bool = True,
    threads: int = 1,
    progress: Told | None = None,
    started: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time and peak memory of one training step of every method.

    Args:
        names: of methods; all balancing methods when empty.
        tasks: numbers of tasks.
        trunks: names of :data:`~polytask.benchmark.workload.TRUNKS`.
        levels: where polytask takes gradients.
        beside: files with other libraries' contenders, whose methods are measured in the same rounds as polytask's of the same name.
        rounds: of timing.
        memory: whether peaks are measured, which takes one process each.
        threads: of torch.
        progress: told (what, done, of how many).
        started: results of an earlier run with as many rounds on a machine like this one; its rows are not measured again.
        keep: called with the results so far after each method on each workload.

    Returns:
        JSON-ready: ``machine``, and ``rows`` with ``trunk``, ``tasks``, ``library``, ``method``, ``level``, ``ratio`` {median, low, high}
        to a plain step (quartiles over rounds), ``peak_bytes`` and ``peak_ratio``, ``of_ours`` (for other libraries: polytask's time at the
        same level over theirs, the median of paired rounds), and ``error`` where a contender did not run.

    Raises:
        InputError: an unknown method, trunk or file, before anything is measured.
    """
    names = list(names) or [*(m.name for m in methods("balancing")), "famo:one look"]
    found = gather(names, levels, beside)
    scenes = [(trunk, k) for trunk in trunks for k in tasks]
    for trunk in trunks:
        Workload(trunk, min(tasks))
    groups = [[c for c in found if c.method == method] for method in dict.fromkeys(c.method for c in found)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    results = {
        "polytask": polytask.__version__,
        "schema": 1,
        "machine": machine(threads),
        "rounds": rounds,
        "rows": rows,
    }
    known = {_place(r): r for r in _going_on(started, results, memory)}
    try:
        for i, (trunk, k) in enumerate(scenes):
            reference = plain(Workload(trunk, k))
            base = peak_bytes(trunk, k, None) if memory else None
            for j, group in enumerate(groups):
                if progress is not None:
                    progress(f"{group[0].method}, {trunk}, {k} tasks", i * len(groups) + j, len(scenes) * len(groups))
                places = [(trunk, k, *c.key) for c in group]
                if all(p in known for p in places):
                    rows += [known[p] for p in places]
                    continue
                for row in measured(group, trunk, k, reference, rounds):
                    if memory and "error" not in row:
                        key = Key(row["library"], row["method"], row["level"])
                        row["peak_bytes"] = peak_bytes(trunk, k, key, beside)
                        row["peak_ratio"] = row["peak_bytes"] / base if base and row["peak_bytes"] else None
                    rows.append(row)
                if keep is not None:
                    keep(results)
    finally:
        torch.set_num_threads(before)
    return results


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["trunk"], row["tasks"], row["library"], row["method"], row["level"]


def _going_on(started: Mapping[str, Any] | None, results: Mapping[str, Any], memory: bool) -> list[dict[str, Any]]:
    """The rows of an earlier run that count in this one."""
    alike = ("polytask", "schema", "machine", "rounds")
    if started is None or any(started.get(k) != results[k] for k in alike):
        return []
    return [r for r in started["rows"] if "error" in r or ("peak_bytes" in r) >= memory]


def measured(group: Sequence[Contender], trunk: str, k: int, reference: Step, rounds: int) -> list[dict[str, Any]]:
    """The rows of one method on one workload: all libraries and levels in the same rounds."""
    steps: dict[Key, Step] = {}
    failed: dict[Key, str] = {}
    reference()
    for contender in group:
        try:
            step = contender.make(Workload(trunk, k))
            step()
            step()
        except Exception as error:  # of whatever library; it is reported in its row
            failed[contender.key] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        else:
            steps[contender.key] = step
    found = ratios(steps, reference, rounds) if steps else {}
    rows = []
    for contender in group:
        key = contender.key
        row: dict[str, Any] = {"trunk": trunk, "tasks": k, **key._asdict()}
        if key in failed:
            rows.append({**row, "error": failed[key]})
            continue
        own = found.get(Key(OURS, key.method, key.level))
        paired = None if own is None or key.library == OURS else [a / b for a, b in zip(own, found[key], strict=True)]
        of_ours = None if paired is None else statistics.median(paired)
        rows.append({**row, "ratio": asdict(Ratio.of(found[key])), "of_ours": of_ours})
    return rows


def machine(threads: int) -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
    }

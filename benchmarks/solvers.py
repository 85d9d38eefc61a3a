"""Time of one K x K solve of every Gramian method, in milliseconds.

    python benchmarks/solvers.py [--tasks 2 10 40 100] [--kind high_dimensional common_part degenerate] [--seconds 0.2] [--json]

Each figure is the median over several random Gramians of the fastest of repeated calls, on one thread: what the method costs a step beyond
the gradients. ``degenerate`` Gramians have fewer dimensions than tasks, the hardest case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from polytask.balancing import GramianWeighting, make
from polytask.registry import methods

KINDS = ("high_dimensional", "common_part", "degenerate")


def gramian(kind: str, tasks: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dimensions = tasks // 2 + 1 if kind == "degenerate" else 10 * tasks
    G = rng.standard_normal((tasks, dimensions))
    if kind != "high_dimensional":
        G += 0.3 * rng.standard_normal(dimensions)
    G *= 10 ** rng.uniform(-1, 1, (tasks, 1))
    return G @ G.T


def milliseconds(name: str, kind: str, tasks: int, seconds: float) -> float:
    found = []
    for seed in range(5):
        balancer = make(name)
        assert isinstance(balancer, GramianWeighting)
        balancer.bind([str(i) for i in range(tasks)])
        C, losses = gramian(kind, tasks, seed), np.ones(tasks)
        best, until = float("inf"), time.perf_counter() + seconds / 5
        while True:
            started = time.perf_counter()
            balancer.weights_of(C, losses)
            now = time.perf_counter()
            best = min(best, now - started)
            if now >= until:
                break
        found.append(1e3 * best)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 10, 40, 100])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each figure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = [m.name for m in methods("balancing") if issubclass(m.factory, GramianWeighting) and not m.example]
    columns = [(kind, k) for kind in options.kind for k in options.tasks]
    table = {name: [milliseconds(name, kind, k, options.seconds) for kind, k in columns] for name in names}
    if options.json:
        print(json.dumps({"columns": columns, "milliseconds": table}))
        return
    print("ms per solve".ljust(14) + "".join(kind[:20].rjust(8 * len(options.tasks)) for kind in options.kind))
    print("".ljust(14) + "".join(f"K={k}".rjust(8) for _, k in columns))
    for name, row in table.items():
        print(name.ljust(14) + "".join(f"{ms:8.2f}" for ms in row))


if __name__ == "__main__":
    main()

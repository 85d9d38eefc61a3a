"""Time of one K x K solve of every Gramian method, in milliseconds.

    python benchmarks/solvers.py [--tasks 2 10 40 100] [--kind high_dimensional ...] [--methods upgrad ...] [--seconds 0.2] [--json]
    python benchmarks/solvers.py --worst [--seeds 20] ...
    python benchmarks/solvers.py --torchjd [--tasks 10 40]

Each figure is the median (with ``--worst`` the largest) over several random Gramians of the fastest of repeated calls, in the thread's
own time and on one thread: what the method costs a step beyond the gradients. Every other Gramian comes with equal losses, the others
with losses spread over a decade. ``degenerate`` Gramians have half as many dimensions as tasks, ``badly_scaled`` ones lengths over 12
decades; ``thin`` ones have 0.6 times as many dimensions and nothing in common, which leaves few directions that oppose none,
``narrow`` ones 0.54 times, which leaves hardly any, and ``opposed`` ones a third, which leaves none. With ``--torchjd`` the same
Gramians go in turns through TorchJD's solver of the same method (its extras installed), and the median ratio of times is printed: how
many times faster polytask's is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from polytask.balancing import GramianWeighting, make
from polytask.registry import methods

KINDS = ("high_dimensional", "common_part", "degenerate", "badly_scaled", "thin", "narrow", "opposed")
Solve = Callable[[], object]


def gramian(kind: str, tasks: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    few = {
        "degenerate": tasks // 2 + 1,
        "thin": max(2, round(0.6 * tasks)),
        "narrow": max(2, round(0.54 * tasks)),
        "opposed": max(1, tasks // 3),
    }
    dimensions = few.get(kind, 10 * tasks)
    G = rng.standard_normal((tasks, dimensions))
    if kind in ("common_part", "degenerate", "badly_scaled"):
        G += 0.3 * rng.standard_normal(dimensions)
    decades = 12 if kind == "badly_scaled" else 2
    G *= 10 ** rng.uniform(-decades / 2, decades / 2, (tasks, 1))
    return G @ G.T


def fastest(solves: list[Solve], seconds: float) -> list[float]:
    """The least time of each, in milliseconds, taking turns."""
    best, until = [float("inf")] * len(solves), time.perf_counter() + seconds
    while True:
        for i, solve in enumerate(solves):
            started = time.thread_time()
            solve()
            best[i] = min(best[i], 1e3 * (time.thread_time() - started))
        if time.perf_counter() >= until:
            return best


def own(name: str, C: np.ndarray, seed: int = 0) -> Solve:
    """A solve of polytask's."""
    balancer = make(name)
    assert isinstance(balancer, GramianWeighting)
    balancer.bind([str(i) for i in range(len(C))])
    losses = 10 ** (np.random.default_rng(seed).uniform(-0.5, 0.5, len(C)) * (seed % 2))
    return lambda: balancer.weights_of(C, losses)


def milliseconds(name: str, kind: str, tasks: int, options: argparse.Namespace) -> float:
    each = [
        fastest([own(name, gramian(kind, tasks, seed), seed)], options.seconds / options.seeds)[0]
        for seed in range(options.seeds)
    ]
    return max(each) if options.worst else statistics.median(each)


def peers() -> dict[str, Callable[[int], Callable[[torch.Tensor], object]]]:
    """TorchJD's solvers by polytask's name: from the number of tasks to a function of the Gramian (of a square root of it: Nash)."""
    from torchjd import aggregation as jd

    gramian_based = {
        "upgrad": lambda: jd.UPGradWeighting(),
        "dualproj": lambda: jd.DualProjWeighting(),
        "mgda": lambda: jd.MGDAWeighting(),
        "cagrad": lambda: jd.CAGradWeighting(c=0.5),
        "pcgrad": lambda: jd.PCGradWeighting(),
        "gradvac": lambda: jd.GradVacWeighting(),
        "imtl_g": lambda: jd.IMTLGWeighting(),
        "aligned_mtl": lambda: jd.AlignedMTLWeighting(),
        "fairgrad": lambda: jd.FairGradWeighting(alpha=2.0),
    }
    table: dict[str, Callable[[int], Callable[[torch.Tensor], object]]] = {
        name: lambda _, build=build: build() for name, build in gramian_based.items()
    }
    table["nash_mtl"] = lambda tasks: jd.NashMTL(n_tasks=tasks)
    return table


def beside_torchjd(name: str, kind: str, tasks: int, seconds: float) -> tuple[float, float, float]:
    """Milliseconds of polytask and of TorchJD, and the median of the ratio of the second to the first."""
    both = []
    for seed in range(5):
        C = gramian(kind, tasks, seed)
        solve = peers()[name](tasks)
        # Nash-MTL is given a Jacobian: one of tasks x tasks, so that its products cost nothing
        values, V = np.linalg.eigh(C)
        given = torch.from_numpy(V * np.sqrt(np.maximum(values, 0)) if name == "nash_mtl" else C)
        both.append(fastest([own(name, C), lambda solve=solve, given=given: solve(given)], seconds / 5))
    mine, theirs = zip(*both, strict=True)
    return statistics.median(mine), statistics.median(theirs), statistics.median(t / m for m, t in both)


def print_comparison(names: list[str], columns: list[tuple[str, int]], seconds: float) -> None:
    print("ms per solve of polytask / of TorchJD, times faster")
    print("".ljust(14) + "".join(f"{kind[:16]} K={k}".rjust(28) for kind, k in columns))
    for name in names:
        row = [beside_torchjd(name, kind, k, seconds) for kind, k in columns]
        print(name.ljust(14) + "".join(f"{m:.2f} / {t:.2f} {r:6.1f}x".rjust(28) for m, t, r in row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", type=int, default=None)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=None)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each figure")
    parser.add_argument("--seeds", type=int, default=5, help="random Gramians for each figure")
    parser.add_argument("--worst", action="store_true", help="the largest over the Gramians, not the median")
    parser.add_argument("--torchjd", action="store_true", help="beside TorchJD's solvers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.torchjd:
        columns = [(kind, k) for kind in options.kind or KINDS[:1] for k in options.tasks or (10, 40)]
        print_comparison(options.methods or list(peers()), columns, options.seconds)
        return
    names = options.methods or [
        m.name for m in methods("balancing") if issubclass(m.factory, GramianWeighting) and not m.example
    ]
    kinds, tasks = options.kind or KINDS, options.tasks or (2, 10, 40, 100)
    columns = [(kind, k) for kind in kinds for k in tasks]
    table = {name: [milliseconds(name, kind, k, options) for kind, k in columns] for name in names}
    if options.json:
        print(json.dumps({"columns": columns, "milliseconds": table}))
        return
    print(
        ("most ms a solve" if options.worst else "ms per solve").ljust(16)
        + "".join(kind[:20].rjust(8 * len(tasks)) for kind in kinds)
    )
    print("".ljust(16) + "".join(f"K={k}".rjust(8) for _, k in columns))
    for name, row in table.items():
        print(name.ljust(16) + "".join(f"{ms:8.2f}" for ms in row))


if __name__ == "__main__":
    main()

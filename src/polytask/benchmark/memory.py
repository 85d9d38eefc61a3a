"""Peak memory of a step, each in a process of its own that has done nothing else."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from polytask.benchmark.contenders import Key
from polytask.registry import methods

STEPS = 2
TIMEOUT = 600.0


def peak_bytes(trunk: str, n_tasks: int, key: Key | None, beside: Sequence[Path] = ()) -> int | None:
    """How far the resident set grows from before the model is built to its peak over two steps; None where that cannot be told.

    The peak is the kernel's own count (``VmHWM``), so that nothing a library allocates by itself escapes. Processes are forked from one
    that has imported everything and allocated nothing, which a growth is measured from; systems that cannot fork have none.

    Args:
        trunk: of the workload.
        n_tasks: how many tasks.
        key: of the contender; None for the plain step.
        beside: files of other libraries' contenders.
    """
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("forkserver")
    known = [m.factory.__module__ for m in methods()]
    context.set_forkserver_preload(["polytask.benchmark.steps", *dict.fromkeys(known)])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(there, trunk, n_tasks, key, tuple(beside)))
    child.start()
    there.close()
    try:
        found: int | None = here.recv() if here.poll(TIMEOUT) else None
    except EOFError:  # the child ended without a word, out of memory for one
        found = None
    if child.is_alive() and found is None:
        child.terminate()
    child.join()
    return found


def _measure(pipe: Connection, trunk: str, n_tasks: int, key: Key | None, beside: tuple[Path, ...]) -> None:
    import torch

    from polytask.benchmark.contenders import Step, ours, plain, read_beside
    from polytask.benchmark.workload import Workload

    torch.set_num_threads(1)
    make: Callable[[Workload], Step] = plain
    if key is not None:
        level = "auto" if key.level == "values" else key.level
        own = ours([key.method], [level])  # type: ignore[list-item]
        make = next(c for c in [*own, *(c for p in beside for c in read_beside(p))] if c.key == key).make
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()  # type: ignore[no-untyped-call]
    before = _status("VmRSS")
    step = make(Workload(trunk, n_tasks))
    for _ in range(STEPS):
        step()
    pipe.send(_status("VmHWM") - before)
    pipe.close()


def _status(field: str) -> int:
    """Bytes that the kernel counts for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"the kernel does not tell {field}")

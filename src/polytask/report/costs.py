"""Cost of a step: ratios to a plain step with their quartiles and peaks, as tables for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from polytask.report.numbers import finite
from polytask.report.tables import Sheet

COLUMNS = 3
SHORT = {"representation": "repr."}
CAPTION = (
    "Time of a step over that of a plain sum-of-losses step: median (quartiles) over rounds; then peak memory over its peak. "
    "Representation and values are one pass, exact is K."
)
Row = Mapping[str, Any]
Shown = tuple[str, list[int], list[tuple[str, str, str, list[str]]]]


def steps_table(results: Mapping[str, Any]) -> Sheet:
    """One table a trunk, three numbers of tasks side by side."""
    return Sheet(lambda width: Group(*(_table(s, width) for s in _pages(results)), Text("\n".join(_words(results)))))


def steps_markdown(results: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    parts = [f"{CAPTION} {_machine(results)}"]
    for trunk, tasks, rows in _pages(results):
        head = ["method", "library", "level", *(f"K = {k}" for k in tasks)]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join([method, library, level, *cells]) + " |" for method, library, level, cells in rows]
        parts.append(f"## {trunk}\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, *(f"- {w}" for w in _words(results))]) + "\n"


def _pages(results: Mapping[str, Any]) -> Iterator[Shown]:
    """For each trunk and three numbers of tasks: (method, library, level, one cell a number of tasks)."""
    rows: Sequence[Row] = results["rows"]
    tasks = list(dict.fromkeys(r["tasks"] for r in rows))
    for trunk in dict.fromkeys(r["trunk"] for r in rows):
        for first in range(0, len(tasks), COLUMNS):
            columns = tasks[first : first + COLUMNS]
            at = {(r["method"], r["library"], r["level"], r["tasks"]): r for r in rows if r["trunk"] == trunk}
            keys = dict.fromkeys((m, lib, lev) for m, lib, lev, _ in at)
            yield trunk, columns, [(*key, [_cell(at.get((*key, k))) for k in columns]) for key in keys]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "failed"
    ratio = row["ratio"]
    peak = finite(row.get("peak_ratio"))
    shown = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return shown if peak is None else f"{shown} {peak:.1f}"


def _table(shown: Shown, width: int) -> Table:
    trunk, tasks, rows = shown
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), width=width, title_justify="left")
    table.title = Text(f"{trunk}: step over plain step (quartiles), peak over plain peak")
    table.add_column("Method", overflow="ellipsis", no_wrap=True, ratio=1, min_width=10)
    table.add_column("Level", no_wrap=True)
    for k in tasks:
        table.add_column(f"K = {k}", justify="right", no_wrap=True)
    for method, library, level, cells in rows:
        own = library == "polytask"
        label = Text(method) if own else Text(f"  {library.replace('torchjd', 'TorchJD')}", style="dim")
        table.add_row(label, SHORT.get(level, level), *cells)
    return table


def _words(results: Mapping[str, Any]) -> list[str]:
    """Against each other library, and what did not run."""
    found = []
    rows: Sequence[Row] = results["rows"]
    for library in dict.fromkeys(r["library"] for r in rows if r.get("of_ours") is not None):
        ours = sorted(r["of_ours"] for r in rows if r["library"] == library and r.get("of_ours") is not None)
        found.append(
            f"polytask's time over that of {library}, same method, level, trunk and tasks, in paired rounds: median "
            f"{ours[len(ours) // 2]:.2f}, from {ours[0]:.2f} to {ours[-1]:.2f} ({len(ours)} pairs)."
        )
    failed = [r for r in rows if "error" in r]
    found += [
        f"{r['library']} {r['method']} ({r['level']}) failed on {r['trunk']} with {r['tasks']} tasks: {r['error']}"
        for r in failed
    ]
    return [*found, _machine(results)]


def _machine(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    threads = "1 thread" if m["threads"] == 1 else f"{m['threads']} threads"
    return f"Measured with polytask {results['polytask']}, torch {m['torch']}, {threads}, {results['rounds']} rounds, on {m['platform']}."

"""The diagnosis of task interference for the terminal: which gradients oppose, and whether more often than noise would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from polytask.report.numbers import MISSING, plain, share, shortened
from polytask.report.reading import CONFLICT, TESTED, Pair, Results, check, entry, pairs
from polytask.report.tables import Sheet, finding, framed

MOST_TASKS, MOST_PAIRS, WIDE = 12, 12, 96
HOW_TO_READ = (
    "Below zero: a step that helps one task sets the other back. Believe it only where the pair conflicts more often than the null, "
    "which is how often mini-batches of one task conflict with each other (on the diagonal: their mean cosine)."
)


def explain(results: Results) -> Sheet:
    """Cosines between task gradients, conflict rates of the pairs against the null, and what they mean.

    Raises:
        InputError: the results lack a part that every run has.
    """
    check(results)
    seen = results.get("interference") or {}
    if not seen.get("epochs") or len(seen.get("tasks") or ()) < 2:
        why = "there is only one task" if len(results["tasks"]) < 2 else "gradients were not observed in this run"
        return Sheet(lambda _: Text(f"No diagnosis of interference: {why}."))
    return Sheet(lambda width: _diagnosis(seen, pairs(results), width))


def _diagnosis(seen: Mapping[str, Any], found: Sequence[Pair], width: int) -> Group:
    said = [Text(f"- {s}") for s in seen.get("sentences") or _own_sentences(found)]
    parts: list[RenderableType] = [framed("Interference between tasks", *said), _cosines(seen, width)]
    parts.append(_pairs(found[:MOST_PAIRS], width))
    if len(found) > MOST_PAIRS:
        rest = f"{len(found) - MOST_PAIRS} more pairs, with less conflict beyond the null, stand in the report."
        parts.append(Text(rest, style="dim"))
    return Group(*parts, Text(HOW_TO_READ, style="dim"))


def _own_sentences(found: Sequence[Pair]) -> list[str]:
    opposed = [p for p in found if p.reading in (CONFLICT, TESTED)]
    if not opposed:
        return ["No pair of tasks conflicts more often than mini-batches of one task do."]
    return [
        f"{p.first} and {p.second} conflict in {share(p.rate)} of the mini-batches; one task alone does in {share(p.null_rate)}."
        for p in opposed
    ]


def _cosines(seen: Mapping[str, Any], width: int) -> Group:
    names, last = seen["tasks"], len(seen["epochs"]) - 1
    shown = min(len(names), MOST_TASKS, (width - 20) // 6)
    title = f"Cosine between task gradients, epoch {seen['epochs'][last]}"
    title += f", the first {shown} of {len(names)} tasks" if shown < len(names) else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for i in range(shown):
        table.add_column(str(i + 1), justify="right", no_wrap=True)
    room = min(40, max(12, width - 8 - 6 * shown))
    for i in range(shown):
        table.add_row(
            Text(f"{i + 1} {shortened(names[i], room - 3)}"), *(_cosine(seen, last, i, j) for j in range(shown))
        )
    return Group(Text(title, style="italic"), table)


def _cosine(seen: Mapping[str, Any], epoch: int, i: int, j: int) -> Text:
    found = entry(seen, "null", epoch, i) if i == j else entry(seen, "cosine", epoch, i, j)
    style = "dim" if i == j or found is None else "red" if found < 0 else ""
    return Text("–" if found is None else plain(found, 2), style=style)


def _pairs(found: Sequence[Pair], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), width=width)
    table.add_column("Pair of tasks", ratio=1, overflow="ellipsis", no_wrap=True, min_width=12)
    heads = ("Cosine", "Conflicts", "Null", "Beyond noise") if width >= WIDE else ("Cosine", "Conflicts", "Null")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Reading", no_wrap=True)
    for pair in found:
        beyond, seen = pair.beyond_noise
        cells = [plain(pair.cosine, 2, sign=True), share(pair.rate), share(pair.null_rate)]
        cells.append(f"{beyond}/{seen}" if seen else MISSING)
        room = (width - (64 if width >= WIDE else 52)) // 2
        names = f"{shortened(pair.first, room)} – {shortened(pair.second, room)}"
        table.add_row(Text(names), *cells[: len(heads)], finding(pair.reading))
    return table

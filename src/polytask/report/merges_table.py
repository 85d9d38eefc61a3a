"""The comparison of merging methods as a table for the terminal, never wider than 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from polytask.report.merges_reading import (
    BASELINE,
    ahead_in,
    check_merges,
    covered,
    distinct,
    effect_of,
    points,
    repeated,
    size,
    whole_seconds,
)
from polytask.report.numbers import bracket, plain
from polytask.report.reading import Results, interval
from polytask.report.tables import COLOURS, WIDE, Sheet, framed


def merges_table(results: Results) -> Sheet:
    """The verdict in words, then every candidate: normalised and mean accuracy, difference to task arithmetic, cost.

    Raises:
        InputError: the results are of something else.
    """
    check_merges(results)
    return Sheet(lambda width: Group(framed("Verdict", Text(results["verdict"]["text"])), _table(results, width)))


def _table(results: Results, width: int) -> Table:
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), width=width, caption_justify="left")
    rows = distinct(results)
    several = any(ahead_in(results, c) for c in rows)
    said = [
        "Percent of the experts' accuracy on test rows; mean accuracy over tasks; points beyond task arithmetic (TA).",
        "*: chosen on validation.",
    ]
    said += ["Ahead: of TA, in so many lineages."] * several + [covered(results), *repeated(results)]
    table.caption = Text(" ".join(said))
    table.add_column("Method", ratio=1, overflow="ellipsis", no_wrap=True, min_width=14)
    ahead, costs = ["Ahead"] if several else [], ["Secs", "Memory"] if wide else []
    for head in ("Of experts", "Mean", "Against TA", *ahead, *costs):
        table.add_column(head, justify="right", no_wrap=True)
    for c in rows:
        chosen = c["name"] == results["verdict"]["method"]
        label = Text(f"{'* ' if chosen else '  '}{c['label']}", style="bold" if chosen else "")
        count = [ahead_in(results, c).replace(" of ", "/")] if several else []
        cost = [plain(whole_seconds(c), 1), size(c["peak_bytes"])] if c["role"] != "reference" else ["", ""]
        table.add_row(label, *_values(c, wide), *count, *(cost if wide else []))
    return table


def _values(c: Mapping[str, Any], wide: bool) -> list[RenderableType]:
    effect = effect_of(c)
    share, mean, difference = (points(interval(c[k])) for k in ("normalised", "mean_accuracy", "difference"))
    spread = f" {bracket(share.low, share.high, 1)}" if wide and c["name"] != "experts" else ""
    beside = f" {bracket(difference.low, difference.high, 1, sign=True)}" if wide else ""
    against = f"{effect.symbol} {plain(difference.mean, 1, sign=True)}{beside}"
    shown = Text("" if c["name"] == BASELINE else against, style=COLOURS[effect.style])
    return [f"{plain(share.mean, 1)}{spread}", plain(mean.mean, 1), shown]

"""Interference between tasks: cosine heat-maps over time, and pairs of tasks beside the null within one task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from polytask.report.curves import thinned
from polytask.report.markup import Markup, join, section, tag
from polytask.report.matrix import colour_scale, matrix_map, opacity_of, style_of
from polytask.report.numbers import MISSING, plain, share
from polytask.report.reading import Pair, Results, entry, pairs

MOST_EPOCHS, THUMBNAILS, PAIRS_SHOWN = 40, 6, 10
HOW_TO_READ = (
    "A cell below zero (orange) says that a step which helps one task sets the other back; believe it only where the pair conflicts more "
    "often than the null, which is how mini-batches of one and the same task agree: its cosine stands on the dashed diagonal, its "
    "conflicts in the column “Null”."
)


def interference(results: Results) -> Markup:
    """Cosines between task gradients over time against the null, how to read them, and what they say."""
    seen = results.get("interference") or {}
    if not seen.get("epochs") or len(seen.get("tasks") or ()) < 2:
        why = "there is only one task" if len(results["tasks"]) < 2 else "gradients were not observed in this run"
        return section(
            "interference", "Interference between tasks", tag("p", f"Nothing to show: {why}.", class_="nothing")
        )
    findings = tag("ul", *(tag("li", s) for s in seen.get("sentences") or ()), class_="reasons")
    words = tag("div", findings, tag("p", tag("b", "How to read it. "), HOW_TO_READ, class_="note"))
    beside = "beside" if len(seen["tasks"]) <= 8 else "above"
    maps = tag("div", words, heat_maps(seen), class_=f"maps {beside}")
    return section("interference", "Interference between tasks", maps, pair_table(pairs(results)))


def heat_maps(seen: Mapping[str, Any]) -> Markup:
    """One large map with an epoch slider, small ones of some epochs below it, and the colour scale.

    Args:
        seen: the part ``interference`` of the results, with at least one epoch.
    """
    epochs = seen["epochs"]
    kept = thinned(len(epochs), MOST_EPOCHS)
    frames = [_cells(seen, e) for e in kept]
    # the null of the first epochs towers over everything: between tasks the colours are kept apart, the diagonal may saturate
    between = [
        c for frame in frames for i, row in enumerate(frame) for j, c in enumerate(row) if i != j and c is not None
    ]
    limit = max([0.1, *map(abs, between)])
    data = {"epochs": [epochs[e] for e in kept], "limit": limit, "frames": frames}
    several = len(kept) > 1
    return tag(
        "figure",
        _slider(len(kept), epochs[kept[-1]]) if several else tag("figcaption", f"Epoch {epochs[kept[-1]]}"),
        tag("div", _large_map(seen["tasks"], frames[-1], limit, epochs[kept[-1]]), class_="scroll", tabindex=0),
        colour_scale(limit),
        _thumbnails(frames, [epochs[e] for e in kept], limit) if several else None,
        tag("script", _json(data), type="application/json", class_="frames"),
        class_="heat",
    )


def _cells(seen: Mapping[str, Any], e: int) -> list[list[float | None]]:
    # a gradient's cosine with itself says nothing: the diagonal shows how a task agrees with itself between mini-batches
    K = range(len(seen["tasks"]))
    found = [[entry(seen, "null", e, i) if i == j else entry(seen, "cosine", e, i, j) for j in K] for i in K]
    return [[None if c is None else round(c, 3) for c in row] for row in found]


def _slider(steps: int, last: object) -> Markup:
    slide = tag("input", type="range", min=0, max=steps - 1, value=steps - 1, step=1, class_="epoch-slider")
    return tag("label", "Epoch ", slide, tag("output", last), class_="slider")


def _large_map(names: Sequence[str], cells: Sequence[Sequence[float | None]], limit: float, epoch: object) -> Markup:
    described = f"{len(names)} by {len(names)} cosines of task gradients at epoch {epoch}; the same numbers stand in results.json."
    return matrix_map(
        names,
        cells,
        limit,
        title="Cosine between task gradients",
        described=described,
        meaning=lambda i, j: (
            f"{names[i]} and {names[j]}" if i != j else f"{names[i]} with itself, between mini-batches"
        ),
    )


def _thumbnails(frames: Sequence[Sequence[Sequence[float | None]]], epochs: Sequence[object], limit: float) -> Markup:
    buttons = []
    for step in thinned(len(frames), THUMBNAILS):
        K = len(frames[step])
        cells = [_thumbnail_cell(i, j, frames[step][i][j], limit) for i in range(K) for j in range(K)]
        small = tag("svg", *cells, viewBox=f"0 0 {K} {K}", class_="thumb", aria_hidden="true")
        buttons.append(tag("button", f"epoch {epochs[step]}", small, type="button", data_step=step))
    return tag("div", *buttons, class_="thumbnails")


def _thumbnail_cell(i: int, j: int, cosine: float | None, limit: float) -> Markup:
    return tag(
        "rect", x=j, y=i, width=0.94, height=0.94, class_=style_of(cosine), fill_opacity=opacity_of(cosine, limit)
    )


def _json(data: object) -> Markup:
    # the browser unescapes nothing inside a script, so the one dangerous character is written as JSON writes it
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def pair_table(found: Sequence[Pair]) -> Markup:
    """Every pair of tasks: cosine, how often it conflicts, how often one task conflicts with itself, the course over time."""
    first, rest = found[:PAIRS_SHOWN], found[PAIRS_SHOWN:]
    if not rest:
        return _pairs(first)
    more = tag("summary", f"The other {len(rest)} pairs, with less conflict beyond the null")
    return join(_pairs(first), tag("details", more, _pairs(rest)))


def _pairs(found: Sequence[Pair]) -> Markup:
    titles = ("Pair of tasks", "Mean cosine", "Conflicts", "Null", "Beyond noise", "Over time", "Reading")
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))
    return tag("table", head, tag("tbody", *map(_pair_row, found)), class_="cards pairs")


def _pair_row(pair: Pair) -> Markup:
    beyond, seen = pair.beyond_noise
    reading = pair.reading
    return tag(
        "tr",
        tag(
            "th", tag("span", pair.first, class_="name"), " and ", tag("span", pair.second, class_="name"), scope="row"
        ),
        tag("td", plain(pair.cosine, 2, sign=True), class_="number", data_label="Mean cosine"),
        tag("td", share(pair.rate), class_="number", data_label="Conflicts"),
        tag("td", share(pair.null_rate), class_="number", data_label="Null"),
        tag("td", f"{beyond} of {seen} epochs" if seen else MISSING, class_="number", data_label="Beyond noise"),
        tag("td", _sparkline(pair), data_label="Over time"),
        tag("td", f"{reading.symbol} {reading.word}", class_=f"effect {reading.style}", data_label="Reading"),
    )


def _sparkline(pair: Pair) -> Markup:
    kept = thinned(len(pair.conflict), MOST_EPOCHS)
    lines = [_spark([pair.null[i] for i in kept], "null"), _spark([pair.conflict[i] for i in kept], "rate")]
    said = f"Share of mini-batches in conflict over time, {share(pair.rate)} on average; the null, dashed, {share(pair.null_rate)}"
    return tag("svg", tag("title", said), *lines, viewBox="0 0 120 28", class_="spark", role="img")


def _spark(values: Sequence[float | None], style: str) -> Markup:
    step = 116 / max(1, len(values) - 1)
    points = " ".join(f"{2 + n * step:.1f},{26 - 24 * v:.1f}" for n, v in enumerate(values) if v is not None)
    return tag("polyline", points=points, class_=style, fill="none")

"""Cutting a table into training, validation and test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polytask.data.targets import check_columns, encode_targets
from polytask.errors import InputError
from polytask.tasks import Binary, Multiclass, Ordinal, Task, Tasks

if TYPE_CHECKING:
    import pandas as pd

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
PARTS = ("training", "validation", "test")
BINS = 5


@dataclass(frozen=True)
class Split:
    """Row numbers (positions, sorted) of the three parts, and how they were cut in one sentence."""

    train: Indices
    validation: Indices
    test: Indices
    how: str

    @property
    def sizes(self) -> dict[str, int]:
        """The number of rows of each part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def split_rows(
    frame: pd.DataFrame,
    tasks: Tasks,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    by: str | None = None,
    by_time: str | None = None,
) -> Split:
    """Cut the rows that have at least one label into training, validation and test.

    By default every class of every target, every fifth of a numeric target and every pattern of missing labels is spread over the parts in
    proportion: iterative stratification, rarest label first, in whole batches of rows.

    Args:
        frame: the table.
        tasks: the targets to stratify on.
        seed: decides the shuffling; the same seed gives the same parts.
        fractions: shares of training, validation and test, each positive, adding up to 1.
        by: a column whose groups (persons, sites) are never cut: all rows of one value fall into one part.
        by_time: a column to order rows by (dates or numbers): training is the earliest, test the latest; equal times stay together.

    Raises:
        InputError: an unknown column, missing groups or times, too few groups, or a part that lacks labels a task needs (named).
    Cost: O(rows * labels) stratified and by time, O(groups * labels) by group.
    Source: Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data" (the order of the labels and their quotas).
    """
    share = np.asarray(fractions, np.float64)
    if share.shape != (3,) or (share <= 0).any() or abs(share.sum() - 1) > 1e-6:
        raise InputError(
            f"the fractions of training, validation and test are three positive numbers adding up to 1, not {fractions}"
        )
    if by is not None and by_time is not None:
        raise InputError(f"a split is either by the groups of {by!r} or by the time {by_time!r}, not both")
    labels = encode_targets(frame, tasks)
    rows = np.flatnonzero(np.logical_or.reduce([_labelled(v) for v in labels.values()]))
    random = np.random.default_rng(seed)
    marks = np.concatenate([_marks(v[rows]) for v in labels.values()], axis=1)
    if by_time is not None:
        part, how = _by_time(frame, by_time, rows, share)
    elif by is not None:
        part, how = _by_group(frame, by, rows, marks, share, random)
    else:
        part = _stratified(marks, share, random)
        how = f"at random, stratified on {_listed(list(tasks))}"
    left_out = len(frame) - len(rows)
    how += f"; {left_out} rows without any label left out" if left_out else ""
    train, validation, test = (rows[part == p] for p in range(3))
    split = Split(train, validation, test, how)
    for task in tasks.values():
        _check_parts(task, labels[task.name], split, strict=by is None and by_time is None)
    return split


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _labelled(labels: Array) -> npt.NDArray[np.bool_]:
    known = np.asarray(labels >= 0 if labels.dtype.kind == "i" else ~np.isnan(labels))
    return np.asarray(known.any(1)) if known.ndim > 1 else known


def _marks(labels: Array) -> npt.NDArray[np.bool_]:
    """What a target's labels are stratified by: one column a class, a fifth of the numbers, or a label, and one for missing."""
    missing = ~_labelled(labels)
    if labels.ndim > 1:
        columns = [labels == 1]
    else:
        known = labels[~missing]
        values, counts = np.unique(known, return_counts=True)
        if labels.dtype.kind == "f" and len(values) > 2 * BINS:
            edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]))
            columns = [np.searchsorted(edges, labels, side="right")[:, None] == np.arange(len(edges) + 1)]
        else:
            columns = [labels[:, None] == values[counts > 1]]
    marks = np.concatenate([*columns, missing[:, None]], axis=1)
    marks[missing, :-1] = False
    return marks[:, marks.any(0)]


def _quota(wanted: Array, held: Indices, n: int) -> Indices:
    """How many of a label's last n rows each part gets, in proportion to what it still wants; at least one where there are enough."""
    wanted = np.maximum(wanted, 0)
    exact = n * wanted / wanted.sum() if wanted.sum() > 0 else np.full(3, n / 3)
    quota: Indices = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: n - quota.sum()]] += 1
    for poor in np.flatnonzero(held + quota == 0):
        rich = int(np.argmax(np.where(quota > 0, held + quota, 0)))
        if held[rich] + quota[rich] > 1 and quota[rich] > 0:
            quota[rich] -= 1
            quota[poor] += 1
    return quota


def _stratified(marks: npt.NDArray[np.bool_], share: Array, random: np.random.Generator) -> Indices:
    n, totals = len(marks), marks.sum(0)
    part = np.full(n, -1, np.int64)
    held, left = np.zeros((3, marks.shape[1]), np.int64), totals.copy()
    # rows alike in all their labels lie side by side, so that dealing one label's rows out evenly balances the others as well
    alike = np.unique(np.packbits(marks, axis=1), axis=0, return_inverse=True)[1].ravel()
    order = np.lexsort((random.permutation(n), alike))
    while left.any():
        label = int(np.where(left > 0, left, n + 1).argmin())
        rows = order[(part[order] < 0) & marks[order, label]]
        part[rows] = dealt = _dealt(_quota(share * totals[label] - held[:, label], held[:, label], len(rows)), random)
        for p in range(3):
            held[p] += marks[rows[dealt == p]].sum(0)
        left = totals - held.sum(0)
    return part


def _dealt(quota: Indices, random: np.random.Generator) -> Indices:
    """A sequence of parts with these totals, each part spread evenly along it from a random start."""
    place = np.concatenate([(np.arange(q) + random.random()) / max(q, 1) for q in quota])
    return np.repeat(np.arange(3), quota)[np.argsort(place, kind="stable")]


def _by_group(
    frame: pd.DataFrame, by: str, rows: Indices, marks: npt.NDArray[np.bool_], share: Array, random: np.random.Generator
) -> tuple[Indices, str]:
    import pandas as pd

    check_columns(frame, [by], "group")
    column = frame[by].iloc[rows]
    if column.isna().any():
        raise InputError(
            f"the group column {by!r} has {int(column.isna().sum())} missing values: every row needs a group"
        )
    group, names = pd.factorize(column)
    if len(names) < 3:
        raise InputError(f"the group column {by!r} has {len(names)} groups, too few for training, validation and test")
    # how many of the rows and of each label a group holds, as shares of the table's: every label weighs the same, however rare
    held_by = np.zeros((len(names), marks.shape[1] + 1))
    np.add.at(held_by, group, np.concatenate([marks, np.ones((len(marks), 1), bool)], axis=1).astype(np.float64))
    held_by /= held_by.sum(0)
    order = np.lexsort((random.permutation(len(names)), -held_by.max(1)))
    held = np.zeros((3, held_by.shape[1]))
    part_of = np.empty(len(names), np.int64)
    for i, g in enumerate(order):
        # the squared distance to the wanted shares changes by this much in each part
        change = (held_by[g] * (2 * (held / share[:, None] - 1) + held_by[g] / share[:, None])).sum(1)
        empty = np.flatnonzero(np.bincount(part_of[order[:i]], minlength=3) == 0)
        p = int(empty[change[empty].argmin()]) if len(order) - i <= len(empty) else int(change.argmin())
        part_of[g], held[p] = p, held[p] + held_by[g]
    return part_of[group], f"by the {len(names)} groups of {by}, none in two parts"


def _by_time(frame: pd.DataFrame, by_time: str, rows: Indices, share: Array) -> tuple[Indices, str]:
    import pandas as pd

    check_columns(frame, [by_time], "time")
    column = frame[by_time].iloc[rows]
    if not (pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_datetime64_any_dtype(column.dtype)):
        parsed = pd.to_datetime(column, errors="coerce", format="mixed")
        unread = column[parsed.isna() & column.notna()]
        if len(unread):
            raise InputError(
                f"the time column {by_time!r} holds {unread.iloc[0]!r}, which is neither a date nor a number"
            )
        column = parsed
    if column.isna().any():
        raise InputError(
            f"the time column {by_time!r} has {int(column.isna().sum())} missing values: every row needs a time"
        )
    times, moment = np.unique(column.to_numpy(), return_inverse=True)
    if len(times) < 3:
        raise InputError(
            f"the time column {by_time!r} has {len(times)} different times, too few for training, validation and test"
        )
    # a moment belongs to the part in which its middle row falls
    n_at = np.bincount(moment)
    middle = (np.cumsum(n_at) - n_at / 2) / len(rows)
    part_of = np.searchsorted(np.cumsum(share)[:2], middle, side="right")
    part_of[0], part_of[-1] = 0, 2
    if not (part_of == 1).any():
        part_of[int(np.abs(middle[1:-1] - share[0] - share[1] / 2).argmin()) + 1] = 1
        part_of = np.maximum.accumulate(part_of)
    return part_of[moment], f"by {by_time}: the earliest rows for training, the latest for test"


def _check_parts(task: Task, labels: Array, split: Split, strict: bool) -> None:
    """Training needs every class; the other parts need two different labels, so that a metric exists there."""
    advice = "more labelled rows are needed" if strict else "choose other fractions or another split"
    parts = dict(zip(PARTS, (split.train, split.validation, split.test), strict=True))
    known = {name: labels[rows][_labelled(labels[rows])] for name, rows in parts.items()}
    for name, found in known.items():
        if len(found) < 2 or (found.ndim == 1 and (found == found[0]).all()):
            what = "no label" if not len(found) else "labels of one value only"
            raise InputError(f"the {name} part has {what} of the target {task.name!r}: {advice}")
    if isinstance(task.kind, Binary | Multiclass | Ordinal):
        codes = np.arange(2 if isinstance(task.kind, Binary) else len(task.classes) or task.kind.output_size)
        lacking = np.setdiff1d(codes, known["training"])
        if len(lacking):
            absent = task.classes[int(lacking[0])] if task.classes else int(lacking[0])
            raise InputError(
                f"the training part has no example of class {absent!r} of the target {task.name!r}: {advice}"
            )

"""Telling what kind of task each target column is, and turning its labels into what the tasks are charged on.

The rule, applied to the known labels of a column (NaN, None and NaT are missing):

1. Two different values: **binary**, whatever they are.
2. Text, categories, Booleans: **multiclass** (refused where nearly every label is different: that is text, not classes).
3. Whole numbers, at most ten different ones: **multiclass**. Where the codes are 0..C-1 and -1, the -1 is a missing label.
4. More whole numbers: **count** if they are at least 0, zero occurs, the mean exceeds the median (a long right tail) and small numbers are
   densely used (at least half of all whole numbers up to the 99th percentile occur); visits and votes are counts, ages, grades and
   amounts of money are not.
5. Any other numbers: **regression**.

Ordinal, quantile and multilabel are never guessed; ``kinds`` asks for them by the name of the target.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError
from polytask.tasks import (
    KINDS,
    Binary,
    Count,
    Kind,
    Multiclass,
    Multilabel,
    Ordinal,
    Quantile,
    Regression,
    Task,
    Tasks,
)

if TYPE_CHECKING:
    import pandas as pd

MOST_CODES = 10
"""Whole numbers with at most so many different values are read as classes."""
FEWEST_EXAMPLES = 3
"""A class needs one example for each of training, validation and test."""

Array = npt.NDArray[Any]


def infer_tasks(frame: pd.DataFrame, targets: Sequence[str], kinds: Mapping[str, str] | None = None) -> Tasks:
    """Make a task of each target column.

    Args:
        frame: the table; every row counts, whether or not all its targets are known.
        targets: names of the target columns.
        kinds: {target: kind} overrules the rule at the head of :mod:`polytask.data.targets`.

    Returns:
        The tasks, with the classes in sorted order (ordinal: numeric order, or the order of an ordered categorical column) and the centre,
        scale and mean of numeric targets taken from ``frame``; :func:`fit_scales` takes them from training rows instead.

    Raises:
        InputError: an unknown, constant, empty, infinite or single-label target, an unknown or unfit kind, a class of fewer than three
            examples; the sentence names the column.
    """
    kinds = dict(kinds or {})
    check_columns(frame, targets, "target")
    if len(set(targets)) < len(targets):
        raise InputError(f"the target {next(t for t in targets if list(targets).count(t) > 1)!r} is given twice")
    for name, kind in kinds.items():
        if name not in targets:
            raise InputError(
                f"a kind is given for {name!r}, which is not one of the targets {', '.join(map(str, targets))}"
            )
        if kind not in KINDS:
            raise InputError(f"{kind!r} is no kind of task for the target {name!r}: choose one of {', '.join(KINDS)}")
    return fit_scales(frame, Tasks(_task(name, frame[name], kinds.get(name)) for name in targets))


def fit_scales(frame: pd.DataFrame, tasks: Tasks) -> Tasks:
    """The same tasks with centre and scale (regression, quantile) or mean (count) taken from the labels in these rows.

    Args:
        frame: the rows to learn them from, in general those of the training part.
        tasks: as :func:`infer_tasks` made them; kinds and classes are kept.
    """
    labels = encode_targets(frame, tasks)
    return Tasks(replace(task, kind=_scaled(task.kind, labels[name])) for name, task in tasks.items())


def encode_targets(frame: pd.DataFrame, tasks: Tasks) -> dict[str, Array]:
    """The labels of every task as arrays the task's loss and metrics read.

    Args:
        frame: has a column for every task.
        tasks: what :func:`infer_tasks` made of the training table.

    Returns:
        {task: labels}: float32 (rows,) with NaN for binary (0/1), regression, quantile and count; int64 (rows,) with -1 for multiclass and
        ordinal; float32 (rows, labels) with NaN for multilabel.

    Raises:
        InputError: a column is absent, a label is infinite, not a number, or of a class unseen in training (named).
    """
    check_columns(frame, list(tasks), "target")
    return {name: _encode(task, frame[name]) for name, task in tasks.items()}


def check_columns(frame: pd.DataFrame, names: Iterable[Any], role: str) -> None:
    """Refuse the first name that is no column of the table, suggesting near ones.

    Raises:
        InputError: with the role the column was to play.
    """
    known = [str(c) for c in frame.columns]
    for name in names:
        if name in frame.columns:
            if known.count(str(name)) > 1:
                raise InputError(f"the table has two columns called {name!r}: rename one of them")
            continue
        folded = {c.lower(): c for c in known}
        near = [folded[c] for c in difflib.get_close_matches(str(name).lower(), list(folded), n=3, cutoff=0.5)]
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"the columns are {', '.join(known[:12])}{', ...' * (len(known) > 12)}"
        )
        raise InputError(f"the table has no {role} column {name!r}; {hint}")


def plain(value: Any) -> Any:
    """A label as JSON holds it: Boolean, whole number, number or text; 2.0 and 2 are the same class."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, bool | int | float | str) else str(value)


def _known(column: pd.Series[Any]) -> pd.Series[Any]:
    """The labels that are not missing, numbers as numbers even where the column is of mixed objects."""
    known = column.dropna()
    return known.infer_objects() if known.dtype == object else known


def _numeric(known: pd.Series[Any]) -> Array | None:
    """The labels as float64 where they are numbers (not Booleans), else None."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(known.dtype) or not pd.api.types.is_numeric_dtype(known.dtype):
        return None
    return known.to_numpy(np.float64)


def _classes(known: pd.Series[Any]) -> tuple[list[Any], Array]:
    """The classes in order, and the number of examples of each; -1 beside codes 0..C-1 is no class."""
    counts = known.value_counts(sort=False)
    found = {plain(value): int(n) for value, n in counts.items() if n}
    if all(isinstance(c, int) and not isinstance(c, bool) for c in found):
        codes = sorted(set(found) - {-1})
        if -1 in found and len(codes) >= 2 and codes == list(range(len(codes))):
            del found[-1]
    dtype = known.dtype
    if getattr(dtype, "ordered", False):
        order = [plain(c) for c in dtype.categories]  # type: ignore[union-attr]
        names = sorted(found, key=order.index)
    else:
        names = sorted(found, key=lambda c: (isinstance(c, str), c))
    return names, np.array([found[c] for c in names])


def _task(name: str, column: pd.Series[Any], kind: str | None) -> Task:
    import pandas as pd

    known = _known(column)
    if not len(known):
        raise InputError(f"the target {name!r} has no label: all {len(column)} are missing")
    if kind == "multilabel":
        return _multilabel(name, known)
    if pd.api.types.is_datetime64_any_dtype(known.dtype):
        raise InputError(
            f"the target {name!r} holds dates, which no kind of task predicts: turn them into numbers first"
        )
    numbers = _numeric(known)
    if numbers is not None and np.isinf(numbers).any():
        raise InputError(f"the target {name!r} has {int(np.isinf(numbers).sum())} infinite values")
    names, counts = _classes(known)
    if len(names) == 1:
        if counts[0] == len(column):
            raise InputError(f"the target {name!r} is constant: every row is {names[0]!r}, there is nothing to learn")
        raise InputError(
            f"the target {name!r} has only one label value, {names[0]!r}: labels of a second value are needed"
        )
    kind = kind or guess_kind(name, numbers, len(names), len(known))
    if kind in ("regression", "quantile", "count"):
        return Task(name, _number_kind(name, kind, numbers))
    rare = int(counts.argmin())
    if counts[rare] < FEWEST_EXAMPLES:
        advice = "merge it with another class, leave its rows out" + (
            ", or give the target another kind" if numbers is not None else ""
        )
        raise InputError(
            f"the target {name!r} has only {counts[rare]} example{'s' * int(counts[rare] > 1)} of class {names[rare]!r}, too few for "
            f"training, validation and test: {advice}"
        )
    return Task(name, _class_kind(name, kind, len(names)), classes=tuple(names))


def guess_kind(name: str, numbers: Array | None, distinct: int, rows: int) -> str:
    """The kind of a column by the rule at the head of :mod:`polytask.data.targets`.

    Args:
        name: of the column.
        numbers: its known labels, where they are numbers.
        distinct: how many different ones there are.
        rows: how many there are.

    Raises:
        InputError: nearly every label is another text.
    """
    if distinct == 2:
        return "binary"
    if numbers is None:
        if distinct > max(20, rows // 3):
            raise InputError(
                f"the target {name!r} holds {distinct} different texts in {rows} rows, too many to be classes"
            )
        return "multiclass"
    whole = bool((numbers == np.round(numbers)).all())
    if whole and distinct <= MOST_CODES:
        return "multiclass"
    return "count" if whole and _looks_counted(numbers) else "regression"


def _looks_counted(numbers: Array) -> bool:
    if numbers.min() != 0 or numbers.mean() <= np.median(numbers):
        return False
    most = np.quantile(numbers, 0.99)
    return bool(len(np.unique(numbers[numbers <= most])) >= 0.5 * (most + 1))


def _number_kind(name: str, kind: str, numbers: Array | None) -> Kind:
    if numbers is None:
        raise InputError(f"the target {name!r} cannot be of kind {kind}: its labels are not numbers")
    if kind == "count":
        if numbers.min() < 0 or (numbers != np.round(numbers)).any():
            raise InputError(
                f"the target {name!r} cannot be of kind count: its labels are not all whole numbers from 0 up"
            )
        return Count()
    return Quantile() if kind == "quantile" else Regression()


def _class_kind(name: str, kind: str, n: int) -> Kind:
    if kind == "binary":
        if n > 2:
            raise InputError(f"the target {name!r} cannot be of kind binary: it has {n} different values")
        return Binary()
    return Ordinal(n) if kind == "ordinal" else Multiclass(n)


def _scaled(kind: Kind, labels: Array) -> Kind:
    known = labels[~np.isnan(labels)].astype(np.float64) if labels.dtype.kind == "f" else labels
    if isinstance(kind, Regression | Quantile) and len(known):
        return replace(kind, center=float(known.mean()), scale=float(known.std()) or 1.0)
    if isinstance(kind, Count) and len(known):
        return replace(kind, mean=float(known.mean()) or 1.0)
    return kind


def _encode(task: Task, column: pd.Series[Any]) -> Array:
    if isinstance(task.kind, Multilabel):
        return _encode_labels(task, column)
    known = _known(column)
    present = column.notna().to_numpy()
    if isinstance(task.kind, Binary | Multiclass | Ordinal):
        as_float = isinstance(task.kind, Binary)
        labels = np.full(len(column), np.nan if as_float else -1, np.float32 if as_float else np.int64)
        codes = _codes(task, known)
        labels[present] = np.where(codes < 0, np.nan, codes) if as_float else codes
        return labels
    numbers = _numeric(known) if len(known) else np.empty(0)
    if numbers is None:
        raise InputError(f"the target {task.name!r} has labels that are not numbers, such as {known.iloc[0]!r}")
    if np.isinf(numbers).any():
        raise InputError(f"the target {task.name!r} has {int(np.isinf(numbers).sum())} infinite values")
    labels = np.full(len(column), np.nan, np.float32)
    labels[present] = numbers
    return labels


def _codes(task: Task, known: pd.Series[Any]) -> Array:
    classes = task.classes or tuple(range(2 if isinstance(task.kind, Binary) else task.kind.output_size))
    index: dict[Any, int] = {c: i for i, c in enumerate(classes)}
    # the same class may be read as text in one file and as a number in another
    texts = {str(c): i for i, c in enumerate(classes)}
    if -1 not in index and all(isinstance(c, int) and not isinstance(c, bool) for c in classes):
        index[-1] = -1
    values, inverse = np.unique(known.astype(object).map(plain).to_numpy(object).astype(str), return_inverse=True)
    first = known.iloc[np.unique(inverse, return_index=True)[1]] if len(known) else known
    code = np.empty(len(values), np.int64)
    for i, value in enumerate(map(plain, first)):
        found = index.get(value, texts.get(str(value)))
        if found is None:
            some = f"{', '.join(repr(c) for c in classes[:8])}{', ...' * (len(classes) > 8)}"
            raise InputError(
                f"the target {task.name!r} has the class {value!r}, unseen in training, whose classes are {some}"
            )
        code[i] = found
    return code[inverse] if len(values) else np.empty(0, np.int64)


def _label_sets(column: pd.Series[Any]) -> list[list[str]]:
    """Every cell's set of labels: a list, or text with the labels between semicolons, bars or commas."""

    def one(cell: Any) -> list[str]:
        if isinstance(cell, str):
            return [s for s in (part.strip() for part in re.split(r"[;|,]", cell)) if s]
        return [str(plain(c)) for c in (cell if isinstance(cell, Iterable) else [cell])]

    return [one(cell) for cell in column]


def _multilabel(name: str, known: pd.Series[Any]) -> Task:
    sets = _label_sets(known)
    labels = sorted({label for s in sets for label in s})
    if not labels:
        raise InputError(f"the target {name!r} has no label: every set is empty")
    for label in labels:
        with_it = sum(label in s for s in sets)
        if with_it == len(sets):
            raise InputError(
                f"the target {name!r} has the label {label!r} in every row: there is nothing to learn about it"
            )
        if with_it < FEWEST_EXAMPLES:
            raise InputError(
                f"the target {name!r} has only {with_it} example{'s' * int(with_it > 1)} of the label {label!r}, too few for training, "
                f"validation and test: leave it out or merge it with another"
            )
    return Task(name, Multilabel(len(labels)), classes=tuple(labels))


def _encode_labels(task: Task, column: pd.Series[Any]) -> Array:
    index = {c: i for i, c in enumerate(task.classes)}
    present = column.notna().to_numpy()
    labels = np.full((len(column), len(index)), np.nan, np.float32)
    labels[present] = 0
    for row, names in zip(np.flatnonzero(present), _label_sets(column[present]), strict=True):
        for name in names:
            if name not in index:
                raise InputError(f"the target {task.name!r} has the label {name!r}, unseen in training")
            labels[row, index[name]] = 1
    return labels

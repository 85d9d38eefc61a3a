"""How an estimator's ``y`` becomes tasks and labels, and how predictions become a ``y`` of the same shape again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.utils.multiclass import type_of_target

from polytask.data.targets import guess_kind
from polytask.errors import InputError
from polytask.tasks import Binary, Count, Multiclass, Ordinal, Regression, Task, Tasks

Array = npt.NDArray[Any]

CLASS_KINDS = ("binary", "multiclass", "ordinal")
NUMBER_KINDS = ("regression", "count")
KIND_NAMES = (*CLASS_KINDS, *NUMBER_KINDS)


def as_columns(y: Any) -> pd.DataFrame:
    """One column a task: names of a DataFrame or Series are kept, others are called ``y``, or ``y0``, ``y1``, ...

    Raises:
        InputError: not one- or two-dimensional, no column, or two columns of one name.
    """
    if isinstance(y, pd.Series):
        frame = y.to_frame("y" if y.name is None else str(y.name))
    elif isinstance(y, pd.DataFrame):
        frame = y.set_axis([str(c) for c in y.columns], axis=1)
    else:
        values = np.asarray(y)
        if values.ndim not in (1, 2):
            raise InputError(f"y has one column a task, shape (rows,) or (rows, tasks), not {values.shape}")
        frame = pd.DataFrame(values)
        frame.columns = pd.Index(["y"] if values.ndim == 1 else [f"y{i}" for i in range(values.shape[1])])
    if frame.shape[1] == 0:
        raise InputError("y has no column: there is no task to learn")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise InputError(f"two columns of y are called {twice[0]!r}")
    return frame.reset_index(drop=True).infer_objects()


@dataclass(frozen=True)
class TargetColumns:
    """What was learnt of ``y`` in ``fit``.

    Attributes:
        tasks: one task a column.
        classes: of each column the user's own labels in the order of the class indices; None for numbers.
        dtypes: of each column the dtype its predictions are given in.
        dimensions: 1 or 2, of ``y``.
        named: whether ``y`` was a DataFrame, so that predictions are one too.
        missing_label: the number that marks a missing class label besides NaN, or None.
    """

    tasks: Tasks
    classes: tuple[Array | None, ...]
    dtypes: tuple[Any, ...]
    dimensions: int
    named: bool
    missing_label: int | None

    @classmethod
    def learn(
        cls, y: Any, kinds: Mapping[str, str] | str | None, allowed: Sequence[str], missing_label: int | None
    ) -> TargetColumns:
        """Read kinds, classes and units from ``y``.

        Args:
            y: (rows,) or (rows, tasks).
            kinds: {column: kind}, or one kind for all columns; the rest is inferred.
            allowed: the kinds that may occur; where they are all of classes, or of numbers, inference stays among them.
            missing_label: see the class.

        Raises:
            InputError: a column without a label, with one class or one value only, with infinite values, of a kind not allowed.
        """
        columns = as_columns(y)
        names = [str(c) for c in columns.columns]
        told = dict.fromkeys(names, kinds) if isinstance(kinds, str) else dict(kinds or {})
        for name, kind in told.items():
            if name not in columns:
                raise InputError(
                    f"task_types names {name!r}, which is no column of y; its columns are {', '.join(names)}"
                )
            if kind not in allowed:
                raise InputError(f"task_types calls {name!r} {kind!r}; possible here are {', '.join(allowed)}")
        read = [
            _read(columns[n], told.get(n) or _infer(columns[n], allowed, missing_label), missing_label) for n in names
        ]
        return cls(
            tasks=Tasks(task for task, _ in read),
            classes=tuple(labels for _, labels in read),
            dtypes=tuple(
                columns[n].dtype if labels is not None else np.dtype(np.float64)
                for n, (_, labels) in zip(names, read, strict=True)
            ),
            dimensions=np.asarray(y).ndim,
            named=isinstance(y, pd.DataFrame),
            missing_label=missing_label,
        )

    def columns(self, y: Any) -> list[pd.Series]:
        """The columns of another ``y``, in the order of the tasks: found by name in a DataFrame, by position otherwise."""
        frame = as_columns(y)
        if isinstance(y, pd.DataFrame) and self.named:
            absent = [n for n in self.tasks if n not in frame]
            if absent:
                raise InputError(f"y has no column {absent[0]!r}, which was a task in fit")
            return [frame[n] for n in self.tasks]
        if frame.shape[1] != len(self.tasks):
            raise InputError(f"y has {frame.shape[1]} columns; in fit it had {len(self.tasks)}")
        return [frame.iloc[:, i] for i in range(len(self.tasks))]

    def known(self, y: Any) -> list[npt.NDArray[np.bool_]]:
        """Of each task, which rows have a label."""
        found = []
        for column, labels in zip(self.columns(y), self.classes, strict=True):
            missing = column.isna()
            if labels is not None and _is_number(column) and self.missing_label not in labels:
                missing |= column == self.missing_label
            found.append(~missing.to_numpy(dtype=bool))
        return found

    def encode(self, y: Any) -> dict[str, Array]:
        """Labels as the tasks take them: float32 with NaN, or int64 class indices with -1.

        Raises:
            InputError: a class that was not there in fit, or a task without a label.
        """
        encoded: dict[str, Array] = {}
        for (name, task), column, labels, known in zip(
            self.tasks.items(), self.columns(y), self.classes, self.known(y), strict=True
        ):
            if labels is None:
                encoded[name] = pd.to_numeric(column).to_numpy(dtype=np.float32, na_value=np.nan)
                continue
            index = pd.Index(labels).get_indexer(pd.Index(column))
            if (index[known] < 0).any():
                raise InputError(
                    f"task {name!r} has the class {column[known][index[known] < 0].iloc[0]!r}, which was not seen in fit"
                )
            index = np.where(known, index, -1)
            binary = isinstance(task.kind, Binary)
            encoded[name] = np.where(known, index, np.nan).astype(np.float32) if binary else index.astype(np.int64)
        return encoded

    def decode(self, predictions: Mapping[str, Array], index: pd.Index | None) -> Any:
        """Predictions in the shape, type and labels of ``y``.

        Args:
            predictions: {task: class indices or numbers, shape (rows,)}.
            index: row names of a DataFrame, or None.
        """
        values = [
            predictions[name].astype(np.float64) if labels is None else labels[predictions[name].astype(np.int64)]
            for name, labels in zip(self.tasks, self.classes, strict=True)
        ]
        if self.named:
            return pd.DataFrame(dict(zip(self.tasks, values, strict=True)), index=index).astype(
                dict(zip(self.tasks, self.dtypes, strict=True))
            )
        if self.dimensions == 1:
            return values[0]
        common = values if len({v.dtype.kind for v in values}) == 1 else [v.astype(object) for v in values]
        return np.stack(common, axis=1)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)


def _missing(column: pd.Series, missing_label: int | None) -> pd.Series:
    """Rows without a class label; next to one other class only, as in -1/+1 coding, the missing label is a class itself."""
    missing = column.isna()
    if missing_label is None or not _is_number(column):
        return missing
    marked = column == missing_label
    return missing if column[~missing & ~marked].nunique() == 1 else missing | marked


def _infer(column: pd.Series, allowed: Sequence[str], missing_label: int | None) -> str:
    if set(allowed) <= set(NUMBER_KINDS):
        return "regression"
    known = column[~_missing(column, missing_label)]
    if set(allowed) <= set(CLASS_KINDS):
        if known.nunique() > 2:
            return "multiclass"
        return "binary"
    guessed = _guess(known)
    # as a number, it may be -1 like anything else
    return guessed if guessed in CLASS_KINDS else _guess(column.dropna())


def _guess(known: pd.Series) -> str:
    numbers = known.to_numpy(dtype=np.float64) if _is_number(known) else None
    return guess_kind(str(known.name), numbers, known.nunique(), len(known))


def _read(column: pd.Series, kind: str, missing_label: int | None) -> tuple[Task, Array | None]:
    name = str(column.name)
    if kind in NUMBER_KINDS:
        return _numbers(column, name, kind), None
    known = column[~_missing(column, missing_label)]
    if known.empty:
        raise InputError(f"task {name!r} has no label at all")
    if kind == "ordinal" and not (_is_number(known) or isinstance(known.dtype, pd.CategoricalDtype)):
        raise InputError(
            f"task {name!r} was called ordinal: its labels must be numbers or an ordered categorical, to tell their order"
        )
    labels = _classes(known, name)
    if len(labels) < 2:
        raise InputError(f"task {name!r} has one class only, {labels[0]!r}: there is nothing to learn")
    if kind == "binary" and len(labels) > 2:
        raise InputError(f"task {name!r} was called binary and has {len(labels)} classes")
    plain = tuple(labels.tolist())
    if kind == "ordinal":
        return Task(name, Ordinal(len(labels)), plain), labels
    return Task(name, Binary() if len(labels) == 2 else Multiclass(len(labels)), plain), labels


def _classes(known: pd.Series, name: str) -> Array:
    """The labels in order: that of the categories of a categorical column, sorted otherwise."""
    if isinstance(known.dtype, pd.CategoricalDtype):
        return known.cat.remove_unused_categories().cat.categories.to_numpy()
    values = known.to_numpy()
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise InputError(f"Unknown label type: task {name!r} is continuous, and a classifier needs classes")
    if values.dtype.kind == "O" and type_of_target(values) == "unknown":
        raise InputError(f"Unknown label type: task {name!r} mixes labels of several types")
    return np.asarray(np.unique(values))


def _numbers(column: pd.Series, name: str, kind: str) -> Task:
    try:
        values = pd.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise InputError(f"task {name!r} is a {kind} task and its labels are not numbers") from error
    if np.isinf(values).any():
        raise InputError(f"task {name!r} has {int(np.isinf(values).sum())} infinite labels")
    known = values[~np.isnan(values)]
    if known.size == 0:
        raise InputError(f"task {name!r} has no label at all")
    if kind == "count":
        if (known < 0).any() or (known != np.round(known)).any():
            raise InputError(f"task {name!r} was called a count and its labels are not all 0, 1, 2, ...")
        return Task(name, Count(mean=max(float(known.mean()), 1e-6)))
    scale = float(known.std())
    if scale == 0.0:
        raise InputError(f"task {name!r} has one value only, {known[0]:g}: there is nothing to learn")
    return Task(name, Regression(center=float(known.mean()), scale=scale))

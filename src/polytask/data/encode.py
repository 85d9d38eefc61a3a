"""Feature columns to numbers: a standardised float32 matrix and integer codes for embeddings, fitted on training rows only.

skrub's TableVectorizer decides what each column is and turns dates and long texts into numbers; what is added here is what a network needs:
codes, standardisation, indicators of missing values, bin edges, and a stored form without pickle.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polytask.data.targets import plain
from polytask.data.vectorizer import CATEGORY, DATE, NUMBER, TEXT, dump, make_vectorizer, parse, restore, roles_of, slim
from polytask.errors import InputError, StorageError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

BINS = 32
ROWS_PER_BIN = 10
FILES = ("encoder.json", "encoder.skops")


@dataclass(frozen=True)
class TableInputs:
    """Encoded rows: ``numeric`` float32 (rows, numbers), ``categorical`` int64 (rows, categories), code 0 = missing or unknown."""

    numeric: npt.NDArray[np.float32]
    categorical: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numeric)

    def tensors(self) -> dict[str, Tensor]:
        """Both as tensors, sharing memory with the arrays."""
        import torch

        return {"numeric": torch.from_numpy(self.numeric), "categorical": torch.from_numpy(self.categorical)}


@dataclass(frozen=True)
class Number:
    """One column of the numeric matrix: (x - center) / scale, missing values filled; an indicator is 1 where its source is missing."""

    name: str
    source: str
    role: str
    center: float = 0.0
    scale: float = 1.0
    fill: float = 0.0
    edges: tuple[float, ...] = ()


@dataclass(frozen=True)
class Category:
    """One column of codes: 1 + the position in ``classes``; 0 = missing, unknown or seen once only."""

    name: str
    classes: tuple[str, ...]


class TableEncoder:
    """Encode feature columns for a network: ``fit`` on training rows, ``transform`` any rows.

    - Numbers and Booleans: standardised; missing values take the median and raise an indicator; infinite values are refused.
    - Text columns of at most ``most_categories`` different values: codes for embeddings.
    - Other text: 32 coordinates of a truncated SVD of tf-idf, over words where cells hold sentences and over letter n-grams otherwise.
    - Dates: year, month, day, weekday, hour, total seconds.
    - Constant and wholly missing columns are dropped.

    Args:
        most_categories: text columns with more different values than that are read as free text.

    Attributes:
        columns: the input columns, in the order of the fitted table.
        spec: a JSON-ready description: ``columns``, ``dropped``, ``features`` (how many input columns of each role), ``numeric`` (names),
            ``numeric_role`` (``number``, ``date``, ``text``, ``missing``), ``bin_edges`` (ascending quantiles of each numeric column in
            standardised units, empty where a column is no measured quantity), ``categorical`` (names), ``cardinalities`` (codes of each
            category column, the 0 included).
    """

    def __init__(self, most_categories: int = 64) -> None:
        self.most_categories = most_categories
        self.columns: list[str] = []
        self._roles: dict[str, str] = {}
        self._numbers: list[Number] = []
        self._categories: list[Category] = []
        self._vectorizer: Any = None

    def fit(self, frame: pd.DataFrame) -> TableEncoder:
        """Learn the encoding from training rows.

        Raises:
            InputError: no row, no column left, two columns of one name, an infinite value (the column is named).
        """
        if not len(frame) or not frame.shape[1]:
            raise InputError(
                "there are no feature columns to encode" if len(frame) else "there are no rows to fit the encoder on"
            )
        frame = check_features(frame)
        self.columns = list(frame.columns)
        frame, self._vectorizer = make_vectorizer(frame, self.most_categories)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._vectorizer.fit(frame)
        slim(self._vectorizer)
        self._roles = roles_of(self._vectorizer)
        encoded = self._vectorized(frame)
        self._categories = [_fit_category(c, encoded[c]) for c, role in self._roles.items() if role == CATEGORY]
        self._numbers = self._fit_numbers(encoded)
        if not self._numbers and not self._categories:
            raise InputError(f"no feature column varies: {', '.join(self.columns)} are constant or wholly missing")
        return self

    def transform(self, frame: pd.DataFrame) -> TableInputs:
        """Encode rows.

        Raises:
            InputError: a column is missing or was not there in training, holds an infinite value, or text where numbers were (named).
        """
        if self._vectorizer is None:
            raise InputError("the table encoder has not been fitted")
        frame = _named(frame)
        missing = [c for c in self.columns if c not in frame.columns]
        extra = [c for c in frame.columns if c not in self.columns]
        if missing:
            raise InputError(f"the table lacks {_some(missing)}, which the model was trained on")
        if extra:
            raise InputError(f"the table has {_some(extra)}, which the model was not trained on: leave it out")
        frame = parse(frame[self.columns], self._roles)
        _refuse_infinite(frame)
        encoded = self._vectorized(frame)
        numeric = np.empty((len(frame), len(self._numbers)), np.float32)
        for j, number in enumerate(self._numbers):
            numeric[:, j] = _encode_number(number, encoded)
        categorical = np.empty((len(frame), len(self._categories)), np.int64)
        for j, category in enumerate(self._categories):
            categorical[:, j] = _encode_category(category, encoded[category.name])
        return TableInputs(numeric, categorical)

    @property
    def spec(self) -> dict[str, Any]:
        """See the class."""
        roles = list(self._roles.values())
        return {
            "columns": self.columns,
            "dropped": [c for c in self.columns if c not in self._roles],
            "features": {"numeric": roles.count(NUMBER), **{r: roles.count(r) for r in (CATEGORY, TEXT, DATE)}},
            "numeric": [n.name for n in self._numbers],
            "numeric_role": [n.role for n in self._numbers],
            "bin_edges": [list(n.edges) for n in self._numbers],
            "categorical": [c.name for c in self._categories],
            "cardinalities": [len(c.classes) + 1 for c in self._categories],
        }

    def save(self, folder: str | Path) -> None:
        """Write ``encoder.json`` and ``encoder.skops`` into a folder, each whole or not at all.

        Raises:
            StorageError: a file cannot be written.
        """
        state = {
            "format": 1,
            "most_categories": self.most_categories,
            "columns": self.columns,
            "roles": self._roles,
            "numbers": [asdict(n) for n in self._numbers],
            "categories": [asdict(c) for c in self._categories],
        }
        contents = (json.dumps(state, indent=1).encode(), dump(self._vectorizer))
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name, content in zip(FILES, contents, strict=True):
                beside = Path(folder) / f".{name}.part"
                beside.write_bytes(content)
                os.replace(beside, Path(folder) / name)
        except OSError as error:
            raise StorageError(f"the encoder cannot be written to {folder}: {error.strerror}") from error

    @classmethod
    def load(cls, folder: str | Path) -> TableEncoder:
        """Read back what :meth:`save` wrote; nothing in the files is executed.

        Raises:
            StorageError: a file is missing, damaged, or holds a type that is not on polytask's list.
        """
        json_file, skops_file = (Path(folder) / name for name in FILES)
        try:
            state = json.loads(json_file.read_text())
            encoder = cls(state["most_categories"])
            encoder.columns, encoder._roles = state["columns"], state["roles"]
            encoder._numbers = [Number(**{**n, "edges": tuple(n["edges"])}) for n in state["numbers"]]
            encoder._categories = [Category(c["name"], tuple(c["classes"])) for c in state["categories"]]
        except OSError as error:
            raise StorageError(f"the encoder's file {json_file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"the encoder's file {json_file} is damaged: {error}") from error
        encoder._vectorizer = restore(skops_file)
        return encoder

    def _vectorized(self, frame: pd.DataFrame) -> pd.DataFrame:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out: pd.DataFrame = self._vectorizer.transform(frame)
        return out

    def _fit_numbers(self, encoded: pd.DataFrame) -> list[Number]:
        outputs: Mapping[str, list[str]] = self._vectorizer.input_to_outputs_
        numbers = []
        for source, role in self._roles.items():
            if role == CATEGORY:
                continue
            fitted = [_fit_number(name, source, role, encoded[name]) for name in outputs[source]]
            numbers += [n for n in fitted if n is not None]
            absent = encoded[outputs[source][0]].isna()
            if role != TEXT and absent.any() and not absent.all():
                numbers.append(Number(f"{source} is missing", outputs[source][0], "missing"))
        return numbers


def check_features(frame: pd.DataFrame) -> pd.DataFrame:
    """The features under names of text and a new index, where they can be read at all.

    Raises:
        InputError: two columns of one name, an infinite value (the column is named).
    """
    frame = _named(frame)
    _refuse_infinite(frame)
    return frame


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    names = [str(c) for c in frame.columns]
    twice = next((c for c in names if names.count(c) > 1), None)
    if twice is not None:
        raise InputError(f"the table has two columns called {twice!r}: rename one of them")
    return frame.set_axis(names, axis=1).reset_index(drop=True)


def _refuse_infinite(frame: pd.DataFrame) -> None:
    for name in frame.columns:
        if frame[name].dtype.kind == "f" and np.isinf(frame[name].to_numpy(np.float64, na_value=np.nan)).any():
            raise InputError(f"the feature column {name!r} has infinite values: replace them or leave the column out")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return f"the column{'s' * (len(names) > 1)} {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _fit_number(name: str, source: str, role: str, column: pd.Series[Any]) -> Number | None:
    values = column.to_numpy(np.float64)
    known = values[~np.isnan(values)]
    if not len(known) or known.min() == known.max():
        return None
    center, scale = float(known.mean()), float(known.std())
    edges: tuple[float, ...] = ()
    if role != TEXT:
        edges = tuple(float(e) for e in np.unique(((_bin_edges(known) - center) / scale).astype(np.float32)))
    return Number(name, source, role, center, scale, float(np.median(known)), edges)


def _bin_edges(known: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Quantiles, but for values so common that quantiles would fall together on them: these get one edge and the others the rest.

    A column of amounts that is nine tenths zeros would otherwise spend nearly all of its bins on the zeros.
    """
    bins = int(np.clip(len(known) // ROWS_PER_BIN, 1, BINS))
    values, counts = np.unique(known, return_counts=True)
    common = values[counts > len(known) / bins]
    rest = known[~np.isin(known, common)]
    spread = np.quantile(rest, np.linspace(0, 1, max(bins - len(common), 1) + 1)) if len(rest) else rest
    return np.unique(np.concatenate([common, spread]))


def _encode_number(number: Number, encoded: pd.DataFrame) -> npt.NDArray[Any]:
    if number.role == "missing":
        return encoded[number.source].isna().to_numpy(np.float32)
    values = encoded[number.name].to_numpy(np.float64)
    return (np.where(np.isnan(values), number.fill, values) - number.center) / number.scale


def _texts(column: pd.Series[Any]) -> pd.Series[Any]:
    return column.astype(object).where(column.notna()).map(lambda v: str(plain(v)), na_action="ignore")


def _fit_category(name: str, column: pd.Series[Any]) -> Category:
    counts = _texts(column).value_counts()
    # a value seen once teaches its embedding nothing general: it trains the embedding of unknown values instead
    return Category(name, tuple(sorted(str(c) for c, n in counts.items() if n > 1)))


def _encode_category(category: Category, column: pd.Series[Any]) -> npt.NDArray[Any]:
    codes = {c: i for i, c in enumerate(category.classes, start=1)}
    found: npt.NDArray[Any] = _texts(column).map(codes).fillna(0).to_numpy(np.int64)
    return found

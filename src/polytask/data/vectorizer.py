"""skrub's TableVectorizer as polytask sets it up, and its stored form in skops with a closed list of types."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import InputError, StorageError

if TYPE_CHECKING:
    import pandas as pd

NUMBER, CATEGORY, TEXT, DATE = "number", "categorical", "text", "date"
COORDINATES = 32
VOCABULARY = 4_000
ROWS_FOR_VOCABULARY = 20_000
WORDS_IN_A_SENTENCE = 3.0

TRUSTED_TYPES = frozenset(
    {
        "numpy.dtype",
        "polytask.data.vectorizer.NumbersOnly",
        "skrub._apply_to_each_col.ApplyToEachCol",
        "skrub._check_input.CheckInputDataFrame",
        "skrub._clean_categories.CleanCategories",
        "skrub._clean_null_strings.CleanNullStrings",
        "skrub._dataframe._common.is_any_date",
        "skrub._dataframe._common.is_categorical",
        "skrub._dataframe._common.is_numeric",
        "skrub._datetime_encoder.DatetimeEncoder",
        "skrub._drop_uninformative.DropUninformative",
        "skrub._duration_to_float.DurationToFloat",
        "skrub._string_encoder.StringEncoder",
        "skrub._table_vectorizer.PassThrough",
        "skrub._table_vectorizer.ShortReprDict",
        "skrub._table_vectorizer.TableVectorizer",
        "skrub._table_vectorizer._created_by_predicate",
        "skrub._to_datetime.ToDatetime",
        "skrub._to_float.ToFloat",
        "skrub._to_str.ToStr",
        "skrub.selectors._base.All",
        "skrub.selectors._base.And",
        "skrub.selectors._base.Cols",
        "skrub.selectors._base.Filter",
        "skrub.selectors._base.Sub",
        "skrub.selectors._selectors._cardinality_below",
    }
)
"""Everything beyond skops' own list of harmless types that a stored encoder may hold."""


class NumbersOnly:
    """Does what a TableVectorizer does to numbers and Booleans, for tables that hold nothing else: skrub takes seconds to import.

    Attributes:
        input_to_outputs_: {column kept: itself}; constant and wholly missing columns are dropped.
    """

    def fit(self, frame: pd.DataFrame) -> NumbersOnly:
        varying = [c for c in frame.columns if frame[c].nunique(dropna=False) > 1]
        self.input_to_outputs_ = {c: [c] for c in varying}
        self.kind_to_columns_ = {"numeric": varying}
        self.all_processing_steps_: dict[str, list[Any]] = {c: [] for c in varying}
        return self

    def transform(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[list(self.input_to_outputs_)].astype("float64")


def _is_number(dtype: Any) -> bool:
    import pandas as pd

    return pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype)


def make_vectorizer(frame: pd.DataFrame, most_categories: int) -> tuple[pd.DataFrame, Any]:
    """An unfitted TableVectorizer for these columns, and the columns as it shall see them (free text as strings)."""
    if all(_is_number(dtype) for dtype in frame.dtypes):
        return frame, NumbersOnly()
    from skrub import DatetimeEncoder, StringEncoder, TableVectorizer

    texts = {c: _text_options(frame[c]) for c in frame.columns if _is_text(frame[c], most_categories)}
    frame = parse(frame, dict.fromkeys(texts, TEXT))
    encoders = [(StringEncoder(n_components=COORDINATES, random_state=0, **o), [c]) for c, o in texts.items()]
    vectorizer = TableVectorizer(
        cardinality_threshold=most_categories + 1,
        low_cardinality="passthrough",
        high_cardinality=StringEncoder(n_components=COORDINATES, random_state=0),
        numeric="passthrough",
        datetime=DatetimeEncoder(add_weekday=True, add_total_seconds=True),
        specific_transformers=encoders,
        drop_if_constant=True,
        drop_null_fraction=1.0,
    )
    return frame, vectorizer


def slim(vectorizer: Any) -> None:
    """Drop from a fitted vectorizer the copies of the vocabularies that only fitting reads: they would make up most of its file."""
    vectorizer.specific_transformers = ()
    for steps in vectorizer.all_processing_steps_.values():
        for step in steps:
            if hasattr(step, "vocabulary"):
                step.vocabulary = step.vectorizer_.vocabulary = None


def roles_of(vectorizer: Any) -> dict[str, str]:
    """{input column: role} of a fitted TableVectorizer, without the columns it drops."""
    kinds = {
        "numeric": NUMBER,
        "low_cardinality": CATEGORY,
        "high_cardinality": TEXT,
        "specific": TEXT,
        "datetime": DATE,
    }
    role = {c: kinds[kind] for kind, columns in vectorizer.kind_to_columns_.items() for c in columns}
    return {c: role[c] for c, outputs in vectorizer.input_to_outputs_.items() if outputs and c in role}


def parse(frame: pd.DataFrame, roles: Mapping[str, str]) -> pd.DataFrame:
    """Columns in the types they had in training, whatever the file at hand made of them.

    Raises:
        InputError: text where numbers were.
    """
    import pandas as pd

    columns = {}
    for name in frame.columns:
        column, role = frame[name], roles.get(name)
        if role == NUMBER and not pd.api.types.is_numeric_dtype(column.dtype):
            numbers = pd.to_numeric(column, errors="coerce")
            unread = column[numbers.isna() & column.notna()]
            if len(unread):
                raise InputError(f"the column {name!r} held numbers in training and now holds {unread.iloc[0]!r}")
            column = numbers.astype("float64")
        elif role in (TEXT, CATEGORY):
            column = column.astype(object).where(column.notna(), None).map(str, na_action="ignore").astype("str")
        elif role == DATE and not pd.api.types.is_datetime64_any_dtype(column.dtype) and not column.notna().any():
            column = pd.to_datetime(column)
        columns[name] = column
    return pd.DataFrame(columns, index=frame.index)


def _is_text(column: pd.Series[Any], most_categories: int) -> bool:
    """Strings of many different values that are not dates."""
    import pandas as pd
    from skrub import ToDatetime
    from skrub.core import RejectColumn

    strings = pd.api.types.is_string_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype)
    if not (strings or column.dtype == object) or column.nunique() <= most_categories:
        return False
    if pd.to_numeric(column, errors="coerce").notna().sum() == column.notna().sum():
        return False
    try:
        ToDatetime().fit_transform(column)
    except RejectColumn:
        return True
    return False


def _text_options(column: pd.Series[Any]) -> dict[str, Any]:
    """Words for sentences, letter n-grams for names and codes; the vocabulary is bounded, so that no column can grow the model."""
    from sklearn.feature_extraction.text import CountVectorizer

    known = column.dropna().astype(str)
    if len(known) > ROWS_FOR_VOCABULARY:
        known = known.sample(ROWS_FOR_VOCABULARY, random_state=0)
    sentences = known.map(lambda cell: len(cell.split())).mean() >= WORDS_IN_A_SENTENCE
    options: dict[str, Any] = (
        {"analyzer": "word", "ngram_range": (1, 1)} if sentences else {"analyzer": "char_wb", "ngram_range": (3, 4)}
    )
    try:
        found = CountVectorizer(max_features=VOCABULARY, **options).fit(known).vocabulary_
    except ValueError:
        # no word of two letters in it: single letters then
        options = {"analyzer": "char_wb", "ngram_range": (1, 2)}
        found = CountVectorizer(max_features=VOCABULARY, **options).fit(known).vocabulary_
    return {**options, "vocabulary": {str(term): int(i) for term, i in found.items()}}


def dump(vectorizer: Any) -> bytes:
    """A fitted vectorizer in skops' form.

    Raises:
        StorageError: it holds a type that :func:`restore` would refuse.
    """
    import skops.io

    content: bytes = skops.io.dumps(vectorizer, compression=zipfile.ZIP_DEFLATED)
    _trusted(skops.io.get_untrusted_types(data=content), "the encoder")
    return content


def restore(path: Path) -> Any:
    """Read what :func:`dump` made.

    Raises:
        StorageError: the file is missing, damaged, or holds a type outside ``TRUSTED_TYPES``.
    """
    import skops.io

    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"the encoder's file {path} cannot be read: {error.strerror}") from error
    try:
        types = skops.io.get_untrusted_types(data=content)
    except Exception as error:
        raise StorageError(f"the encoder's file {path} is damaged") from error
    trusted = _trusted(types, f"the encoder's file {path}")
    try:
        return skops.io.loads(content, trusted=trusted)
    except Exception as error:
        raise StorageError(
            f"the encoder's file {path} is damaged, or was written with another version of skrub: {error}"
        ) from error


def _trusted(types: list[str], what: str) -> list[str]:
    foreign = sorted(set(types) - TRUSTED_TYPES)
    if foreign:
        raise StorageError(f"{what} holds the type {foreign[0]}, which is not on the list of types that polytask loads")
    return types

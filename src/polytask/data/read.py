"""Reading a table from a file, with one clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import csv
import gzip
import io
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import InputError, StorageError

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = ",;\t|"
MISSING = ("?",)
"""Tokens read as missing in text files, beside those of pandas (empty, NA, N/A, NaN, null, None, ...)."""


def read_table(path: str | Path, *, columns: Sequence[str] | None = None, encoding: str = "utf-8") -> pd.DataFrame:
    """Read a CSV, TSV, Parquet or Feather file, each also compressed with gzip (``.csv.gz``, ``.parquet.gz``, ...).

    In text files the separator is found among comma, semicolon, tab and bar, blanks after it are dropped, and ``?`` is missing besides
    the tokens of pandas. A first column without a name that merely counts the rows (an index written by pandas) is left out.

    Args:
        path: the file; its suffix says the format: ``.csv .tsv .tab .txt .data``, ``.parquet .pq``, ``.feather .arrow``.
        columns: names of the columns of a text file that has no header row.
        encoding: of a text file; a byte order mark overrules it.

    Returns:
        The table, rows numbered from 0.

    Raises:
        InputError: no such file, an unknown suffix, an empty file, duplicate column names, ragged rows, another encoding.
        StorageError: the file is truncated, damaged or may not be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is a folder, not a file" if path.is_dir() else f"there is no file {path}")
    suffixes = [s.lower() for s in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    reader = _READERS.get(suffix[0] if suffix else "")
    if reader is None:
        raise InputError(f"{path.name} has no known suffix: a table ends in {', '.join(_READERS)}, each also with .gz")
    content = _content(path, packed)
    if not content.strip():
        raise InputError(f"the file {path.name} is empty")
    if reader is _read_text:
        separator = "\t" if suffix[0] in (".tsv", ".tab") else None
        frame = _read_text(content, path.name, separator, columns, encoding)
    else:
        frame = reader(content, path.name)
    if not len(frame):
        raise InputError(f"the file {path.name} has column names but no rows")
    return frame


def _content(path: Path, packed: bool) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if packed and raw else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise StorageError(
            f"the file {path.name} is truncated or damaged: its gzip stream cannot be read ({error})"
        ) from error
    except OSError as error:
        raise StorageError(f"the file {path} cannot be read: {error.strerror}") from error


def _refuse_duplicates(names: Sequence[str], file: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1 and name != ""]
    if twice:
        raise InputError(f"the file {file} has two columns called {twice[0]!r}: rename one of them")


def _decode(content: bytes, file: str, encoding: str) -> str:
    for mark, name in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            encoding = name
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file {file} is not {encoding} text (byte {error.start}): save it as UTF-8, or give its encoding"
        ) from error
    except LookupError as error:
        raise InputError(f"there is no text encoding called {encoding!r}") from error
    if "\0" in text:
        raise InputError(f"the file {file} holds binary data, not text")
    return text


def _find_separator(text: str) -> str:
    """The candidate that cuts the first rows into the same number of fields most often, at least two; comma if none does."""
    sample = text[:65536]
    lines = sample.splitlines(keepends=True)
    if len(sample) < len(text) and len(lines) > 1:
        lines = lines[:-1]
    best, best_score = ",", (0.0, 0)
    for separator in SEPARATORS:
        widths = [len(row) for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
        width, rows = Counter(widths).most_common(1)[0] if widths else (1, 0)
        score = (rows / len(widths), width) if width > 1 and widths[0] == width else (0.0, 0)
        if score > best_score:
            best, best_score = separator, score
    return best


def _read_text(
    content: bytes, file: str, separator: str | None, columns: Sequence[str] | None, encoding: str
) -> pd.DataFrame:
    import pandas as pd

    csv.field_size_limit(2**31 - 1)
    text = _decode(content, file, encoding)
    separator = separator or _find_separator(text)
    header = next((r for r in csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True) if r), [])
    if columns is not None and len(columns) != len(header):
        raise InputError(f"the file {file} has {len(header)} columns, but {len(columns)} names were given for them")
    _refuse_duplicates(header if columns is None else list(columns), file)
    options: dict[str, Any] = {"header": None, "names": list(columns)} if columns is not None else {}
    with warnings.catch_warnings():
        # pandas would cut rows that are longer than the header and only warn of it
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            frame = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                skipinitialspace=True,
                na_values=list(MISSING),
                index_col=False,
                low_memory=False,
                **options,
            )
        except pd.errors.ParserWarning as error:
            raise InputError(
                f"the file {file} has rows with more fields than the {len(header)} column names"
            ) from error
        except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise InputError(f"the file {file} is not a regular table: {str(error).strip()}") from error
    return _without_row_numbers(frame, header[0] if columns is None else "named")


def _without_row_numbers(frame: pd.DataFrame, first_name: str) -> pd.DataFrame:
    first = frame.iloc[:, 0]
    counts = first_name == "" and first.dtype.kind == "i" and (first.to_numpy() == range(len(frame))).all()
    return frame.iloc[:, 1:] if counts and frame.shape[1] > 1 else frame


def _read_parquet(content: bytes, file: str) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return _from_arrow(lambda: pq.ParquetFile(pa.BufferReader(content)).read(), file, "Parquet")


def _read_feather(content: bytes, file: str) -> pd.DataFrame:
    import pyarrow as pa
    from pyarrow import feather

    return _from_arrow(lambda: feather.read_table(pa.BufferReader(content)), file, "Feather")


def _from_arrow(read: Callable[[], object], file: str, form: str) -> pd.DataFrame:
    import pyarrow as pa

    try:
        table = read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"the file {file} is truncated or not a {form} file") from error
    assert isinstance(table, pa.Table)
    _refuse_duplicates(table.column_names, file)
    frame: pd.DataFrame = table.to_pandas()
    return frame.reset_index(drop=True)


_READERS: dict[str, Callable[..., pd.DataFrame]] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt", ".data"), _read_text),
    **dict.fromkeys((".parquet", ".pq"), _read_parquet),
    **dict.fromkeys((".feather", ".arrow"), _read_feather),
}

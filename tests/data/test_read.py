"""Reading: the same table from every format, and one sentence for everything that can be wrong with a file."""

import gzip
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data import read_table
from polytask.errors import InputError, StorageError

TABLE = pd.DataFrame({"n": [1, 2, 3], "x": [0.5, np.nan, -1.25], "s": ["a, b", "c", None]})


def write(folder, suffix, frame=TABLE):
    path = folder / f"table{suffix}"
    plain = suffix.removesuffix(".gz")
    if plain in (".csv", ".txt"):
        content = frame.to_csv(index=False).encode()
    elif plain == ".tsv":
        content = frame.to_csv(index=False, sep="\t").encode()
    else:
        buffer = io.BytesIO()
        (frame.to_parquet if plain == ".parquet" else frame.to_feather)(buffer)
        content = buffer.getvalue()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".parquet", ".feather"])
def test_every_format_gives_the_same_table(tmp_path, suffix, packed):
    pd.testing.assert_frame_equal(read_table(write(tmp_path, suffix + packed)), TABLE)


names = st.lists(
    st.text("abcxyz ", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=2, max_size=4, unique=True
)


@given(names=names, separator=st.sampled_from(",;\t|"), rows=st.integers(1, 9), data=st.data())
@settings(deadline=None)
def test_the_separator_is_found(tmp_path_factory, names, separator, rows, data):
    cells = st.text('ab"' + separator, min_size=1, max_size=6).map(lambda s: "q" + s)
    frame = pd.DataFrame({n: data.draw(st.lists(cells, min_size=rows, max_size=rows)) for n in names})
    path = tmp_path_factory.mktemp("sep") / "t.csv"
    frame.to_csv(path, index=False, sep=separator)
    assert read_table(path).to_dict("list") == frame.to_dict("list")


def test_missing_tokens_and_blanks_after_the_separator(tmp_path):
    path = tmp_path / "t.data"
    path.write_text("a, b, c\n1, ?, x\n?, 2, NA\n")
    frame = read_table(path)
    assert list(frame.columns) == ["a", "b", "c"]
    assert frame.isna().to_numpy().tolist() == [[False, True, False], [True, False, True]]
    assert frame["a"].dtype.kind == "f"


def test_an_index_written_by_pandas_is_left_out_and_other_first_columns_are_not(tmp_path):
    TABLE.to_csv(tmp_path / "t.csv")
    assert list(read_table(tmp_path / "t.csv").columns) == ["n", "x", "s"]
    TABLE.set_axis([3, 4, 9]).to_csv(tmp_path / "u.csv")
    assert read_table(tmp_path / "u.csv").shape == (3, 4)


def test_names_for_a_file_without_header(tmp_path):
    (tmp_path / "t.csv").write_text("1,2\n3,4\n")
    assert read_table(tmp_path / "t.csv", columns=["a", "b"]).to_dict("list") == {"a": [1, 3], "b": [2, 4]}
    with pytest.raises(InputError, match="has 2 columns, but 3 names"):
        read_table(tmp_path / "t.csv", columns=["a", "b", "c"])


def test_encodings(tmp_path):
    path = tmp_path / "t.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("é,b\nü,1\nö,2\n", encoding=encoding)
        assert read_table(path)["é"].tolist() == ["ü", "ö"]
    path.write_text("é,b\nü,1\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"t\.csv is not utf-8 text \(byte 0\)"):
        read_table(path)
    assert read_table(path, encoding="latin-1").columns[0] == "é"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"", "the file t.csv is empty"),
        ("t.csv", b" \n\n", "the file t.csv is empty"),
        ("t.parquet", b"", "the file t.parquet is empty"),
        ("t.csv", b"a,b\n", "the file t.csv has column names but no rows"),
        ("t.csv", b"a,b,a\n1,2,3\n", "two columns called 'a'"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "t.csv is not a regular table|more fields than the 2 column names"),
        ("t.csv", b"a,b\n1,2,3\n1,2,3\n", "more fields than the 2 column names"),
        ("t.csv", b"a\0b,c\n1,2\n", "binary data"),
        ("t.xlsx", b"PK", "t.xlsx has no known suffix"),
        ("t", b"a,b\n1,2\n", "t has no known suffix"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_table(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_table(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".csv.gz", ".parquet.gz"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = write(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"table\.(parquet|feather|csv).* is truncated"):
        read_table(path)


def test_duplicate_names_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="two columns called 'a'"):
        read_table(tmp_path / "t.parquet")


def test_real_files(shared_data):
    assert read_table(shared_data / "nhanes1" / "NHANESI_subset_X.csv.gz").shape == (9932, 18)
    heart = read_table(shared_data / "heart_disease" / "processed.va.data")
    assert heart.shape == (200, 14)
    assert heart["ca"].isna().mean() > 0.9
    adult = read_table(shared_data / "adult" / "adult.data.gz", columns=[f"c{i}" for i in range(15)])
    assert adult.shape == (32561, 15)
    assert set(adult["c14"]) == {"<=50K", ">50K"}
    assert adult["c1"].isna().sum() == 1836
    reviews = read_table(shared_data / "clothing_reviews" / "reviews.csv.gz")
    assert reviews.shape == (23486, 10)
    assert reviews["Title"].isna().sum() == 3810

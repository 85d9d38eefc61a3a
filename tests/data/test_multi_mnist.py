"""Overlaid pairs: what lies where, what is drawn how often; and the files that images come in."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data.idx import is_image_folder, read_idx, read_images
from polytask.data.multi_mnist import CANVAS, overlay_pairs
from polytask.errors import InputError, StorageError


def images(n: int, size: int = 28, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images that tell which they are: no two alike, labels their number."""
    made = np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)
    return made, np.arange(n)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 9))
def test_each_corner_shows_its_own_image_and_the_overlap_the_brighter_pixel(n: int, rows: int, seed: int) -> None:
    source, labels = images(n)
    pairs = overlay_pairs((source, labels), rows=rows, seed=seed)
    assert pairs.images.shape == (rows, CANVAS, CANVAS)
    gap = CANVAS - 28
    upper, lower = source[pairs.left], source[pairs.right]
    np.testing.assert_array_equal(pairs.images[:, :gap, :28], upper[:, :gap])
    np.testing.assert_array_equal(pairs.images[:, -gap:, -28:], lower[:, -gap:])
    overlap = np.maximum(upper[:, gap:, gap:], lower[:, :-gap, :-gap])
    np.testing.assert_array_equal(pairs.images[:, gap:28, gap:28], overlap)
    assert not pairs.images[:, :gap, 28:].any()
    assert not pairs.images[:, 28:, :gap].any()


@given(st.integers(2, 40), st.integers(0, 9))
def test_no_image_is_drawn_twice_while_they_last(n: int, seed: int) -> None:
    pairs = overlay_pairs(images(n, 4), rows=n // 2, seed=seed)
    assert len({*pairs.left, *pairs.right}) == 2 * (n // 2)


def test_the_draw_is_a_function_of_the_seed() -> None:
    one, again, other = (overlay_pairs(images(50, 4), rows=20, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one.images, again.images)
    np.testing.assert_array_equal(one.left, again.left)
    assert (one.left != other.left).any()


def test_corners_may_have_images_of_their_own() -> None:
    left, right = images(5, 8), (images(3, 6, seed=1)[0], np.array([7, 8, 9]))
    pairs = overlay_pairs(left, right, rows=6, seed=0, canvas=12)
    assert set(pairs.right) == {7, 8, 9}
    np.testing.assert_array_equal(pairs.images[:, -1, -6:], right[0][pairs.right - 7][:, -1])


@pytest.mark.parametrize(
    ("source", "rows", "sentence"),
    [
        (images(3, 40), 2, "40 x 40 do not fit a canvas of 36"),
        ((images(3)[0], np.arange(2)), 2, "3 images and 2 labels"),
        (images(0), 2, "0 images"),
        (images(3), 0, "at least one pair"),
    ],
)
def test_what_makes_no_pairs(source: tuple[np.ndarray, np.ndarray], rows: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        overlay_pairs(source, rows=rows, seed=0)


def write(path: Path, array: np.ndarray) -> Path:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes()) if path.suffix == ".gz" else head + array.tobytes())
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_folder_of_images_is_read_as_written(tmp_path: Path, end: str) -> None:
    made, labels = images(4)
    write(tmp_path / f"train-images-idx3-ubyte{end}", made)
    write(tmp_path / f"train-labels-idx1-ubyte{end}", labels.astype(np.uint8))
    assert is_image_folder(tmp_path)
    found = read_images(tmp_path, "train-")
    assert found is not None
    np.testing.assert_array_equal(found[0], made)
    np.testing.assert_array_equal(found[1], labels)
    assert read_images(tmp_path, "t10k-") is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    made, _ = images(4)
    path = write(tmp_path / "train-images-idx3-ubyte", made)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="train-images-idx3-ubyte is truncated"):
        read_idx(path)
    packed = write(tmp_path / "t10k-images-idx3-ubyte.gz", made)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(StorageError, match=r"t10k-images-idx3-ubyte\.gz is truncated"):
        read_idx(packed)
    path.write_bytes(b"PNG and more")
    with pytest.raises(InputError, match="no IDX file"):
        read_idx(path)
    with pytest.raises(InputError, match="holds only one of"):
        read_images(tmp_path, "train-")


def test_the_real_digits(shared_data: Path) -> None:
    found = read_images(shared_data / "mnist", "t10k-")
    assert found is not None
    assert found[0].shape == (10_000, 28, 28)
    pairs = overlay_pairs(found, rows=5000, seed=0)
    assert sorted([*pairs.left, *pairs.right]) == sorted(found[1])
    # digits keep a margin of four pixels of 28: both are nearly whole, and neither corner is empty
    assert (pairs.images[:, :18, :18].any((1, 2)) & pairs.images[:, 18:, 18:].any((1, 2))).all()

"""The folder of a run: made, guarded against accidents, written whole or not at all, read back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import polytask
from polytask.errors import InputError, StorageError

if TYPE_CHECKING:
    import pandas as pd

RESULTS, CONFIG, MODEL, WORK, LOGS = "results.json", "config.yaml", "model", "work", "logs"


def open_folder(out: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Make the folder ready; ``config`` is written at once, so that an interrupted run can be resumed.

    Args:
        out: the folder.
        config: what the run is.
        resume: go on with what is there.
        overwrite: remove a run that is there, finished or not; anything else is never removed.

    Returns:
        Whether the run is already finished (only with ``resume``).

    Raises:
        InputError: the folder is not empty, or holds another run than the one to be resumed.
        StorageError: it cannot be written.
    """
    there = out.exists() and (not out.is_dir() or any(out.iterdir()))
    ours = (out / CONFIG).is_file()
    try:
        if there and resume:
            _same_run(out, config)
            return (out / RESULTS).is_file()
        if there and not (overwrite and ours):
            way = "take another folder" if overwrite else "take another, or say overwrite or resume"
            raise InputError(f"the folder {out} exists and {'is not empty' if out.is_dir() else 'is a file'}: {way}")
        if there:
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the folder {out} cannot be written: {error.strerror}") from error
    return False


def _same_run(out: Path, config: Mapping[str, Any]) -> None:
    if not (out / CONFIG).is_file():
        raise InputError(f"there is no run to resume in {out}")
    then = read_config(out / CONFIG)
    for part, label in (("data", "data"), ("study", "setting")):
        for name, value in json.loads(json.dumps(config[part])).items():
            if name != "source" and then.get(part, {}).get(name) != value:
                raise InputError(
                    f"the run in {out} cannot be resumed: its {label} {name!r} is {then.get(part, {}).get(name)!r}, not {value!r}"
                )


def read_config(path: Path) -> dict[str, Any]:
    """What ``config.yaml`` says.

    Raises:
        InputError: no such file.
        StorageError: it is damaged.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"data", "study"} <= set(found):
            raise ValueError("it has no parts 'data' and 'study'")
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StorageError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return found


def describe_data(frame: pd.DataFrame, source: str) -> dict[str, Any]:
    """Where a table came from and what was in it: a replay on other rows is refused."""
    import pandas as pd

    values = pd.util.hash_pandas_object(frame.astype(object).where(frame.notna(), None).astype(str), index=False)
    columns = [str(c) for c in frame.columns]
    digest = hashlib.sha256(values.to_numpy().tobytes() + json.dumps(columns).encode())
    return {"source": source, "rows": len(frame), "columns": len(columns), "sha256": digest.hexdigest()}


def config_of(settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.yaml``."""
    return {"polytask": polytask.__version__, "schema": 1, "data": dict(data), "study": dict(settings)}


def read_results(folder: Path) -> dict[str, Any]:
    """What ``results.json`` says.

    Raises:
        InputError: the folder holds no finished run.
        StorageError: the file is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        unfinished = (folder / CONFIG).is_file()
        raise InputError(f"the run in {folder} has not finished" if unfinished else f"there is no run in {folder}")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    return found


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, undefined numbers as null; it comes last, so its presence says that the run is finished."""
    write_text(folder / RESULTS, json.dumps(plain(results), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The same with JSON's types only, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def replace_folder(folder: Path, files: Iterable[Path]) -> None:
    """Put finished files where the folder was."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for file in files:
        os.replace(file, folder / file.name)

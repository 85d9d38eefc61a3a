"""The file that says what is compared: the base, the experts, their data, the methods; paths are relative to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytask.errors import InputError, StorageError
from polytask.merging.checkpoint import open_checkpoint
from polytask.training.data import TaskData
from polytask.training.merges.candidates import TRIALS, Candidate
from polytask.training.merges.compare import PROXY_ROWS
from polytask.training.merges.lineage import Lineage, MergeTask, State
from polytask.training.merges.modules import filled, load_function, transformers_model
from polytask.training.merges.systems import candidate, every_method

KNOWN = ("base", "model", "head", "seeds", "trials", "proxy_rows", "methods", "tasks")
OF_TASK = ("name", "expert", "validation", "test", "proxy", "head")
OF_METHOD = ("method", "candidate", "filters", "name")
LABELS, INPUTS, SEED = "labels", "inputs", "{seed}"


@dataclass(frozen=True)
class Comparison:
    """What a file says: everything :func:`~polytask.training.merges.compare` takes.

    Attributes:
        tasks: with their data.
        candidates: beside the references and task arithmetic.
        left_out: methods that cannot take part, with the reason.
        seeds: numbers that stand for ``{seed}`` in paths and seed random draws.
        trials: settings a method may try.
        proxy_rows: inputs a task that statistics are gathered on.
        lineage: reads the base and the experts of a seed.
        fingerprint: of a seed: names, sizes and times of its files, so that a stored result is taken for the same files only.
    """

    tasks: tuple[MergeTask, ...]
    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str]
    seeds: tuple[int, ...]
    trials: int
    proxy_rows: int
    lineage: Callable[[int], Lineage]
    fingerprint: Callable[[int], str]


def read_comparison(
    file: Path, *, methods: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> Comparison:
    """Read a comparison's file and the data it names; weights are read when a seed's turn comes.

    Args:
        file: YAML; see docs/merge-compare.md.
        methods: names that stand in for the file's.
        seeds: numbers that stand in for the file's.

    Raises:
        InputError: not YAML, an unknown key, a task without expert or data, data without labels.
        StorageError: a file is missing.
    """
    said = _said(file)
    entries = said["tasks"]
    tasks = tuple(_task(e, file) for e in entries)
    chosen = tuple(_whole(s, "a seed", file) for s in (seeds or said.get("seeds") or (0,)))
    trials, rows = (_whole(said.get(k, d), k, file, 1) for k, d in (("trials", TRIALS), ("proxy_rows", PROXY_ROWS)))
    asked = [{"method": m} for m in methods] if methods else said.get("methods")
    left_out: Mapping[str, str] = {}
    if asked is None:
        candidates, left_out = every_method(len(tasks), trials)
    else:
        candidates = [_candidate(m, len(tasks), trials, file) for m in asked]
    reader = _Reader(said, file)
    models = {seed: list(reader.paths(seed).values()) for seed in chosen}
    data = [_path(e[k], file) for e in entries for k in ("validation", "test", "proxy") if k in e]

    def fingerprint(seed: int) -> str:
        return _fingerprint([*models[seed], *data])

    return Comparison(tasks, tuple(candidates), left_out, chosen, trials, rows, reader.read, fingerprint)


def _said(file: Path) -> dict[str, Any]:
    import yaml

    if not file.exists():
        raise StorageError(f"there is no comparison at {file}")
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{file} is not a YAML file") from None
    if not isinstance(said, dict) or not said.get("base") or not said.get("tasks"):
        raise InputError(f"{file} is no comparison: it says no base, or no tasks")
    unknown = [k for k in said if k not in KNOWN]
    if unknown:
        raise InputError(f"{file} says {unknown[0]!r}, which is not known; known are {', '.join(KNOWN)}")
    if not isinstance(said["tasks"], list) or not all(isinstance(e, dict) for e in said["tasks"]):
        raise InputError(f"the tasks of {file} are a list of entries with {', '.join(OF_TASK[:4])}")
    for entry in said["tasks"]:
        missing = [k for k in OF_TASK[:4] if not entry.get(k)]
        if missing:
            raise InputError(f"the task {entry.get('name', entry)!r} of {file} says no {missing[0]}")
        stray = [k for k in entry if k not in OF_TASK]
        if stray:
            raise InputError(f"the task {entry['name']!r} of {file} says {stray[0]!r}; known are {', '.join(OF_TASK)}")
    names = [str(e["name"]) for e in said["tasks"]]
    if len(set(names)) < len(names):
        raise InputError(f"two tasks of {file} have the same name: {', '.join(names)}")
    return said


def _whole(value: Any, name: str, file: Path, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} in {file} is a whole number from {least}, not {value!r}")
    return value


def _path(text: Any, file: Path) -> Path:
    place = Path(str(text)).expanduser()
    return place if place.is_absolute() else file.parent / place


def _patterns(said: Any) -> tuple[str, ...]:
    return () if said is None else tuple(str(p) for p in (said if isinstance(said, list) else [said]))


def _task(entry: Mapping[str, Any], file: Path) -> MergeTask:
    name = str(entry["name"])
    parts = {
        k: read_rows(_path(entry[k], file), name, labelled=k != "proxy")
        for k in ("validation", "test", "proxy")
        if k in entry
    }
    return MergeTask(name, parts["validation"], parts["test"], parts.get("proxy"))


def read_rows(file: Path, task: str, *, labelled: bool = True) -> TaskData:
    """Rows of a task out of a ``.safetensors`` or ``.npz`` file: ``inputs``, or the model's own keywords, and ``labels``.

    Raises:
        InputError: no such format, no labels or inputs, labels that are not whole numbers from 0, different numbers of rows.
        StorageError: the file is missing or cut short.
    """
    found = _tensors(file)
    labels = found.pop(LABELS, None)
    if not found:
        raise InputError(f"{file} holds no inputs")
    if labels is None and labelled:
        raise InputError(f"{file} holds no {LABELS}: it has {', '.join(found)}")
    if (
        labels is not None
        and labelled
        and (labels.ndim != 1 or labels.is_floating_point() or (len(labels) and int(labels.min()) < 0))
    ):
        raise InputError(
            f"the {LABELS} in {file} are one whole number from 0 a row, but have shape {list(labels.shape)} and are {labels.dtype}"
        )
    inputs = found[INPUTS] if set(found) == {INPUTS} else found
    try:
        return TaskData(inputs, {task: labels.long()} if labels is not None and labelled else {})
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise StorageError(f"there is no file {file}")
    if file.suffix == ".safetensors":
        stored = open_checkpoint(file)
        return {n: stored.read(n) for n in stored.specs}
    if file.suffix != ".npz":
        raise InputError(f"{file} is neither a .safetensors nor a .npz file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {n: torch.from_numpy(arrays[n]) for n in arrays.files}
    except (OSError, ValueError, TypeError, EOFError):
        raise StorageError(f"{file} is cut short, or holds something else than arrays of numbers") from None


def _candidate(entry: Any, experts: int, trials: int, file: Path) -> Candidate:
    said = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(said, dict) or ("method" in said) == ("candidate" in said):
        raise InputError(f"an entry of methods in {file} is a name, or says method or candidate: {entry!r}")
    options = {k: v for k, v in said.items() if k not in OF_METHOD}
    filters = _patterns(said.get("filters"))
    if "method" in said:
        made = candidate(str(said["method"]), experts=experts, trials=trials, options=options, filters=filters)
        return made if "name" not in said else _renamed(made, str(said["name"]))
    function = load_function(str(said["candidate"]), file.parent)
    axes = {n: tuple(v) for n, v in options.items() if isinstance(v, list)}
    fixed = {n: v for n, v in options.items() if n not in axes}
    return Candidate(str(said.get("name") or said["candidate"].rpartition(":")[2]), function, axes, fixed=fixed)


def _renamed(candidate: Candidate, name: str) -> Candidate:
    return replace(candidate, name=name, label=name)


class _Reader:
    """Reads the models of a seed."""

    def __init__(self, said: Mapping[str, Any], file: Path) -> None:
        self.said, self.file = said, file
        self.head = tuple(
            dict.fromkeys((*_patterns(said.get("head")), *(p for e in said["tasks"] for p in _patterns(e.get("head")))))
        )
        model = said.get("model")
        self.factory = load_function(str(model), file.parent) if model and ".py:" in str(model) else None

    def paths(self, seed: int) -> dict[str, Path]:
        """The base (under the empty name) and the experts by task, each checked to be there."""
        named = {"": self.said["base"]} | {str(e["name"]): e["expert"] for e in self.said["tasks"]}
        found = {n: _path(str(p).replace(SEED, str(seed)), self.file) for n, p in named.items()}
        missing = [p for p in found.values() if not p.exists()]
        if missing:
            raise StorageError(f"there is no model at {missing[0]}, which {self.file} names")
        return found

    def read(self, seed: int) -> Lineage:
        """The lineage of a seed."""
        paths = self.paths(seed)
        states = {n: _state(p) for n, p in paths.items()}
        base = states.pop("")
        if self.factory is not None:
            factory = self.factory
            return Lineage(base, states, lambda _, state: filled(factory(state), state), self.head, seed)
        common = self.said.get("model")
        shared = _path(str(common).replace(SEED, str(seed)), self.file) if common else None
        folders = {n: p if (p / "config.json").exists() or shared is None else shared for n, p in paths.items()}

        def build(task: str, state: State) -> nn.Module:
            return transformers_model(folders[task], state)

        # files may hold tensors under older names than models do: what hooks see and what is merged must be called the same
        base, *experts = (build(n, state).state_dict() for n, state in {"": base, **states}.items())
        return Lineage(base, dict(zip(states, experts, strict=True)), build, self.head, seed)


def _state(path: Path) -> State:
    stored = open_checkpoint(path)
    return {n: stored.read(n) for n in stored.specs}


def _fingerprint(files: Sequence[Path]) -> str:
    inside = [f for p in files for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file()]
    return json.dumps([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in inside])

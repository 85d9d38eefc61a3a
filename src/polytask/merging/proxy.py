"""Proxy inputs and the models that run them: what statistics on disk are gathered from."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polytask.errors import InputError, MissingExtraError, StorageError
from polytask.merging.base import TURNED
from polytask.merging.checkpoint import Checkpoint, open_checkpoint
from polytask.merging.engine import all_finite
from polytask.merging.hub import on_hub

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor, nn

ARRAYS = (".safetensors", ".npz")
TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
TEXT = "text"
LABELS = "labels"
CONFIG = "config.json"
FEWEST = 8
"""Examples below which nobody can tell what a layer's inputs look like."""

BATCH = 32
CACHED = re.compile(r"/models--[^/]+--(?P<name>[^/]+)/snapshots/[^/]+$")
"""Where the hub's cache keeps a model."""


@dataclass(frozen=True)
class Proxy:
    """Where each expert's proxy inputs are, and how a model is made that can run them.

    Args:
        data: a file with arrays (``.safetensors``, ``.npz``: ``inputs``, or the names of the model's arguments; ``labels`` are left
            out), a table with a column ``text`` (``.csv .tsv .parquet .jsonl``), or a folder with one such file an expert, named like
            the expert's folder or in the experts' order.
        model: ``MODULE:FACTORY`` or ``FILE.py:FACTORY``, called without arguments for a model that the weights fit; transformers
            folders say themselves what they are.
    """

    data: Path
    model: str | None = None

    def file(self, experts: Sequence[Path], t: int) -> Path:
        """The file of the t-th expert's inputs.

        Raises:
            InputError: the folder holds neither a file of that expert's name nor one an expert.
            StorageError: there is nothing at that path.
        """
        if not self.data.exists():
            raise StorageError(f"there are no proxy inputs at {self.data}")
        if not self.data.is_dir():
            return self.data
        found = sorted(f for f in self.data.iterdir() if f.suffix in (*ARRAYS, *TABLES))
        named = {f.stem: f for f in found}
        names = [expert_name(e) for e in experts]
        if names[t] in named:
            return named[names[t]]
        if len(found) != len(experts) or any(n in named for n in names):
            raise InputError(
                f"{self.data} holds no proxy inputs called {names[t]}, but {', '.join(named) or 'no file at all'}"
            )
        return found[t]

    def gather(self, statistic: str, experts: Sequence[Checkpoint], t: int, base: Path | None) -> dict[str, Tensor]:
        """A statistic of the t-th expert, on its own inputs.

        Args:
            statistic: ``gramian`` or ``fisher``.
            experts: all of them.
            t: which of them.
            base: the base's folder, which knows the architecture and the tokenizer of experts that are adapters.

        Raises:
            InputError: inputs that do not fit the model, too few of them; a model that cannot be built or that the weights do not fit.
            StorageError: a file is missing or cut short.
        """
        from polytask.merging.statistics import gather  # a plan gathers nothing

        file, expert = self.file([e.path for e in experts], t), experts[t]
        batches = self.batches(experts, t, base)
        model = self.build(expert, base)
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        try:
            found = gather(statistic, model, [of_dtype(b, kind) for b in batches])
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"the model of {expert.path} cannot run the inputs of {file}: {reason}") from None
        spoilt = [n for n, S in found.items() if not all_finite(S)]
        if spoilt:
            raise InputError(
                f"the inputs of {file} hold or become NaN or infinite values: {spoilt[0]} of {expert.path} sees them"
            )
        names = stored_names(model, expert)
        kept = {n: n.removesuffix(TURNED) for n in found}
        return {names[w] + n.removeprefix(w): found[n] for n, w in kept.items() if w in names}

    def batches(
        self, experts: Sequence[Checkpoint], t: int, base: Path | None, *, rows: int = BATCH, labelled: bool = False
    ) -> list[Any]:
        """The t-th expert's inputs: tuples of one tensor, or dicts of the model's arguments; with labels, pairs of those and labels.

        Args:
            experts: all of them.
            t: which of them.
            base: see :meth:`gather`.
            rows: examples a batch.
            labelled: whether labels are wanted, an array ``labels`` of the file; else they are left out.

        Raises:
            InputError: too few inputs, or none; no labels.
            StorageError: the file is missing or cut short.
        """
        file = self.file([e.path for e in experts], t)
        arrays = _arrays(file) if file.suffix in ARRAYS else _tokens(file, _configured(experts[t].path, base))
        if labelled and LABELS not in arrays:
            raise InputError(f"{file} holds no array {LABELS!r}, which the method learns from")
        if not labelled:
            arrays.pop(LABELS, None)
        if not set(arrays) - {LABELS}:
            raise InputError(f"{file} holds no proxy inputs")
        lengths = {n: len(a) if a.ndim else 0 for n, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(
                f"the arrays of {file} have different lengths: {', '.join(f'{n} {k}' for n, k in lengths.items())}"
            )
        spoilt = [n for n, a in arrays.items() if not all_finite(a)]
        if spoilt:
            raise InputError(f"the array {spoilt[0]} of {file} holds NaN or infinite values")
        if labelled and (arrays[LABELS].ndim != 1 or not torch.equal(arrays[LABELS], arrays[LABELS].round())):
            raise InputError(f"the labels in {file} are one whole number an example")
        count = next(iter(lengths.values()))
        if count < FEWEST:
            raise InputError(f"{file} holds {count} proxy inputs: {FEWEST} are the least, a few dozen are good")
        found: list[Any] = []
        for start in range(0, count, rows):
            batch = {n: a[start : start + rows] for n, a in arrays.items()}
            labels = batch.pop(LABELS, None)
            inputs = (batch["inputs"],) if set(batch) == {"inputs"} else batch
            found.append(inputs if labels is None else (inputs, labels.long()))
        return found

    def build(self, expert: Checkpoint, base: Path | None = None) -> nn.Module:
        """The model of a checkpoint, with its weights; see :func:`build_model`."""
        return build_model(self.model, expert, base)


def build_model(factory: str | None, checkpoint: Checkpoint, base: Path | None = None) -> nn.Module:
    """The model of a checkpoint, with its weights.

    Args:
        factory: what makes it, ``MODULE:FACTORY`` or ``FILE.py:FACTORY``; transformers folders need none.
        checkpoint: the weights.
        base: the base's folder, which knows the architecture of adapters.

    Raises:
        InputError: it cannot be built, or the weights do not fit.
        MissingExtraError: it is a transformers folder and transformers is not installed.
    """
    if factory is not None:
        return _manufactured(factory, checkpoint)
    folder = _configured(checkpoint.path, base)
    model = _pretrained(folder)
    if folder != checkpoint.path:
        _load(model, checkpoint, f"the model of {folder}", whole=False)
    return model


def of_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating-point arrays in the dtype that the model computes in."""
    if isinstance(batch, dict):
        return {n: of_dtype(a, dtype) for n, a in batch.items()}
    if isinstance(batch, tuple):
        return tuple(of_dtype(a, dtype) for a in batch)
    return batch.to(dtype) if batch.is_floating_point() else batch


def expert_name(path: Path) -> str:
    """What an expert is called: its folder, its file without the ending, or its name on the hub."""
    if on_hub(path):
        return path.name.partition("@")[0]
    whole = path.resolve()
    cached = CACHED.search(whole.as_posix())
    return cached["name"] if cached else whole.stem if path.is_file() else whole.name


def _configured(expert: Path, base: Path | None) -> Path:
    return base if base is not None and not (expert / CONFIG).exists() and (base / CONFIG).exists() else expert


def _manufactured(name: str, checkpoint: Checkpoint) -> nn.Module:
    where, sign, factory = name.rpartition(":")
    if not sign:
        raise InputError(f"a model is named by MODULE:FACTORY or FILE.py:FACTORY, not by {name!r}")
    try:
        made = getattr(_module(where), factory)()
    except Exception as error:  # somebody else's code may raise anything
        raise InputError(f"{name} gives no model: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(made, torch.nn.Module):
        raise InputError(f"{name} gives a {type(made).__name__}, not a torch.nn.Module")
    _load(made, checkpoint, f"the model that {name} gives", whole=True)
    return made


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """What the file calls the tensors of a model that was loaded from it.

    Newer releases of transformers rename tensors as they load; those whose new name they do not tell are known by their values.

    Returns:
        {name in the model: name in the file}, without tensors that were put together or are no different from others.
    """
    state = model.state_dict()
    names = _names(model, checkpoint)
    renamed = {_values(t): n for n, t in state.items() if n not in names}
    if renamed:
        for n, spec in checkpoint.specs.items():
            found = (
                renamed.get(_values(checkpoint.read(n, torch.float32)))
                if n not in names.values() and spec.shape
                else None
            )
            if found is not None:
                names[found] = n
    return names


def _values(tensor: Tensor) -> bytes:
    text = f"{tuple(tensor.shape)}".encode() + tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return hashlib.sha256(text).digest()


def _names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """{name in the model: name in the file}, as far as names tell."""
    from polytask.merging.adaptable import called_in

    state, stored = model.state_dict(), checkpoint.specs
    names = {n: n for n in state if n in stored}
    if len(names) < len(state):
        names |= {own: n for n, own in called_in(model, stored).items() if own in state and own not in names}
    return names


def _load(model: nn.Module, checkpoint: Checkpoint, label: str, *, whole: bool) -> None:
    names = _names(model, checkpoint)
    for n, tensor in model.state_dict().items():
        if n in names and checkpoint.specs[names[n]].shape == tuple(tensor.shape):
            checkpoint.read_into(names[n], tensor)
        elif whole or n in names:
            raise InputError(f"{label} has a tensor {n} of shape {list(tensor.shape)}, which {checkpoint.path} has not")


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None or not Path(where).exists():
        raise ImportError(f"there is no file {where}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pretrained(folder: Path) -> nn.Module:
    config = folder / CONFIG
    if not config.exists():
        raise InputError(
            f"{folder} has no config.json that says what model it is: name a factory with --model MODULE:FACTORY"
        )
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [None]
    transformers = _transformers(f"running the model of {folder}")
    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None:
        raise InputError(
            f"{config} names the architecture {names[0]!r}, which transformers has not: name a factory with --model"
        )
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model: nn.Module = architecture.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"transformers cannot load {folder}: {str(error).partition(chr(10))[0]}") from None
    finally:
        if shown:
            bars.enable_progress_bar()
    return model


def _transformers(feature: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(feature, "transformers") from None


def _arrays(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        opened = open_checkpoint(file)
        return {n: opened.read(n) for n in opened.specs}
    import zipfile

    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as stored:
            return {n: torch.from_numpy(stored[n]) for n in stored.files}
    except TypeError:
        raise InputError(
            f"{file} holds arrays of what is no number: texts come as a table with a column 'text'"
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(file):
            raise InputError(f"{file} holds pickled objects, which may run code when loaded: save numbers") from None
        raise StorageError(f"{file} is cut short or not a file of arrays") from None


def _tokens(file: Path, expert: Path) -> dict[str, Tensor]:
    """A table's texts as the expert's own tokenizer reads them."""
    if file.suffix not in TABLES:
        raise InputError(f"{file} holds no proxy inputs: they come as {', '.join((*ARRAYS, *TABLES))}")
    texts, labels = _texts(file)
    transformers = _transformers(f"reading the text of {file}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(expert, local_files_only=True)
    except (OSError, ValueError, KeyError):
        raise InputError(f"{expert} has no tokenizer to read the text of {file} with") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt")) | labels


def _texts(file: Path) -> tuple[list[str], dict[str, Tensor]]:
    """The column ``text``, and the column ``labels`` of whole numbers where there is one."""
    from polytask.data import read_table

    if file.suffix == ".jsonl":
        import pandas as pd

        try:
            table = pd.read_json(file, lines=True)
        except ValueError:
            raise InputError(f"{file} is not a file with one JSON object a line") from None
    else:
        table = read_table(file)
    if TEXT not in table.columns:
        raise InputError(f"{file} has no column {TEXT!r}; it has {', '.join(map(str, table.columns))}")
    table = table.dropna(subset=[TEXT])
    whole = LABELS in table.columns and table[LABELS].dtype.kind in "iu"
    return [str(t) for t in table[TEXT]], {LABELS: torch.tensor(table[LABELS].to_numpy())} if whole else {}

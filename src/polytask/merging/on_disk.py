"""Merging models on disk, one tensor at a time, into a folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import polytask
from polytask.errors import InputError, StorageError
from polytask.merging.adapter import open_expert
from polytask.merging.base import Filter, Merger
from polytask.merging.checkpoint import ADAPTER, INDEX, PICKLES, Checkpoint
from polytask.merging.engine import Engine, check_finite, written_as
from polytask.merging.hub import fetched
from polytask.merging.in_memory import for_experts, make, make_filter, merging_method
from polytask.merging.matching import ITEMSIZE, Match, Spec, compute_dtype, match, result_dtype, torch_dtype
from polytask.merging.proxy import CONFIG, expert_name
from polytask.merging.safetensors_file import Writer, index_of, shards
from polytask.merging.stored import StoredTensors, TensorFolder, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from polytask.merging.proxy import Proxy
    from polytask.merging.routing import Routing

SHARD_SIZE = 5_000_000_000
GRAMIANS = 3
"""Squares of a layer's inputs in float64 that methods with Gramians hold at a time."""
JOURNAL = "journal.json"
STATISTICS = "statistics"
KEPT = "kept"
RECORD = "merge.json"
WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", *PICKLES)
TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "spiece",
    "sentencepiece",
    "chat_template",
)


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge on disk does, known from headers alone.

    Args:
        experts: files or folders of the fine-tuned models.
        base: file or folder of the model that they started from; None for methods that do without.
        method: see ``polytask methods --family merging``.
        options: the method's options by the tensor's name; the same for all of them by default.
        filters: names of filters that are applied to the task vectors before.
        skip: patterns of tensors that are not merged.
        dtype: of the merged tensors; the base's when omitted.
        seed: of all random draws.
        tokenizer: the model whose tokenizer files are copied; the base when omitted.
        shard_size: bytes a file of the result holds at most.
        proxy: what statistics are gathered from, for methods that need them.
        model: what makes the model, where experts are added without proxy inputs, see :class:`~polytask.merging.proxy.Proxy`.
        routing: what adds low-rank experts to the merged model; the result is then a folder for ``load_routed``.
        headers_only: of models on the hub fetch no weights: for a plan that is only looked at.

    Raises:
        InputError: models that do not fit together; an unknown method or option.
        StorageError: a file is missing or cut short.
    """

    experts: Sequence[Path]
    base: Path | None = None
    method: str = "task_arithmetic"
    options: Callable[[str], Mapping[str, Any]] = field(default=lambda _: {})
    filters: Sequence[str] = ()
    skip: Sequence[str] = ()
    dtype: str | None = None
    seed: int = 0
    tokenizer: Path | None = None
    shard_size: int = SHARD_SIZE
    proxy: Proxy | None = None
    model: str | None = None
    routing: Routing | None = None
    headers_only: bool = False

    def __post_init__(self) -> None:
        if not self.experts:
            raise InputError("there is nothing to merge: no expert was given")
        if self.shard_size <= 0:
            raise InputError(f"the shard size is a positive number of bytes, not {self.shard_size}")
        if self.model is not None and self.routing is None:
            raise InputError("a model without inputs to run tells nothing: name them with --proxy DATA")
        doubled = [n for n in self.names if self.names.count(n) > 1]
        if doubled and self.routing is not None:
            raise InputError(f"two experts are called {doubled[0]}: routed experts go by their names")
        if self.looks_at_data and self.proxy is None:
            raise InputError(f"{self.method} looks at data: name a few dozen inputs of each expert, with --proxy DATA")
        self.check()
        if self.proxy is not None:
            if not self.looks_at_data:
                raise InputError(f"{self.method} looks at no data: leave out the proxy inputs")
            for t in range(len(self.experts)):
                self.proxy.file(self.experts, t)

    def check(self) -> None:
        """Refuse what cannot work, before any tensor is read.

        Raises:
            InputError: the number of experts, a missing base, filters before a method without task vectors.
        """
        self.engine.check(
            self.match.merged, len(self.experts), self.base is not None, len(self.experts) if self.proxy else 0
        )

    @cached_property
    def models(self) -> list[Checkpoint]:
        """The base, where there is one, and the experts."""
        base = None if self.base is None else open_expert(self.base, None, headers_only=self.headers_only)
        experts = [open_expert(p, base, headers_only=self.headers_only) for p in self.experts]
        return experts if base is None else [base, *experts]

    @cached_property
    def match(self) -> Match:
        """Which tensors are merged and which are kept."""
        return match([(str(m.path), m.specs) for m in self.models], self.skip, mixed_dtypes=self.dtype is not None)

    @cached_property
    def engine(self) -> Engine:
        """The method, with its options tensor by tensor."""
        made: dict[str, Merger] = {}
        by_name: dict[str, Merger] = {}
        for name in self.match.merged:
            options = for_experts(self.options(name), self.names)
            key = json.dumps(options, sort_keys=True)
            if key not in made:
                made[key] = make(self.method, **options)
            by_name[name] = made[key]
        filters: list[Filter] = [make_filter(f) for f in self.filters]
        return Engine(by_name.__getitem__, filters, (), self.seed)

    @property
    def title(self) -> str:
        """What the whole of it is called: by the routing, where experts are added."""
        return self.method if self.routing is None else self.routing.method.name

    @property
    def names(self) -> list[str]:
        """What the experts are called."""
        return [expert_name(e) for e in self.experts]

    @property
    def base_folder(self) -> Path | None:
        """Where the base is on this disk."""
        return None if self.base is None else self.models[0].path

    @property
    def reference(self) -> Checkpoint:
        """The model whose tensors stand where none are merged: the base, the first expert, or the one whose model it is with masks."""
        keeps = next((self.engine.merger(n).keeps for n in self.match.merged), None)
        return self.models[0 if keeps is None else keeps - len(self.experts)]

    @property
    def looks_at_data(self) -> bool:
        """Whether the method needs proxy inputs."""
        return self.statistic is not None

    @property
    def statistic(self) -> str | None:
        """Which statistic the method needs of each expert."""
        return next((self.engine.merger(n).statistic for n in self.match.merged), None)

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor of the result."""
        dtype, merging = None if self.dtype is None else result_dtype(self.dtype), set(self.match.merged)
        reference = self.reference.specs
        return {n: Spec(s.shape, dtype or s.dtype) if n in merging else s for n, s in reference.items()}

    @cached_property
    def files(self) -> dict[str, dict[str, Spec]]:
        """The files of the result: {name: its tensors}."""
        return shards(self.specs, self.shard_size)

    @property
    def bytes(self) -> int:
        """Size of the result's tensors."""
        return sum(s.bytes for s in self.specs.values())

    @cached_property
    def peak_bytes(self) -> int:
        """Memory for tensors at the largest one: the models', the method's scratch; what the interpreter itself takes comes on top."""
        peak = 0.0
        for name in self.match.merged:
            size = self.specs[name].elements * ITEMSIZE[self._compute_dtype(name)]
            merger = self.engine.merger(name)
            experts = len(self.sources(name)) - self.has_base(name)
            scratch = merger.scratch + experts * merger.scratch_per_expert
            needed = size * (len(self.sources(name)) + scratch)
            if self.statistic == "gramian" and len(self.specs[name].shape) == 2:
                needed += GRAMIANS * 8 * (self.specs[name].shape[1] + 1) ** 2
            peak = max(peak, needed)
        return round(peak)

    def _compute_dtype(self, name: str) -> str:
        return compute_dtype(m.specs[n].dtype for m, n in self.sources(name))

    def sources(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        """The models that a tensor is merged from, the base first, and what each calls it."""
        return [(m, name) for m in self.models]

    def has_base(self, name: str) -> bool:  # noqa: ARG002
        """Whether the first of a tensor's sources is the base."""
        return self.base is not None

    def taken(self, name: str) -> Tensor:
        """A tensor that is not merged, as it is."""
        return self.reference.read(name)

    def configured(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the result, given the reference's."""
        key = "torch_dtype" if "torch_dtype" in said else "dtype"
        return dict(said) if self.dtype is None else {**said, key: result_dtype(self.dtype)}

    def load(self, name: str) -> tuple[Tensor | None, Tensor]:
        """The base's tensor and the experts', one a row, in the dtype that is computed in.

        Raises:
            InputError: NaN in one of them.
        """
        shape, dtype = self.specs[name].shape or (1,), torch_dtype(self._compute_dtype(name))
        sources, has_base = self.sources(name), self.has_base(name)
        W = torch.empty((len(sources) - has_base, *shape), dtype=dtype)
        W0 = torch.empty(shape, dtype=dtype) if has_base else None
        rows = [*([W0] if W0 is not None else []), *W]
        for row, (m, own) in zip(rows, sources, strict=True):
            m.read_into(own, row)
            check_finite(row, own, str(m.path))
        return W0, W

    def prepare(self, work: Path, told: Callable[[str], None]) -> None:
        """Gather statistics, one expert's model at a time, unless an earlier start has; then let the method see the whole model.

        Args:
            work: the folder of what outlives a merge that is killed.
            told: called with what is being done.
        """
        if self.proxy is not None:
            (work / STATISTICS).mkdir(exist_ok=True)
            files = [work / STATISTICS / f"{t}.safetensors" for t in range(len(self.experts))]
            for t, file in enumerate(files):
                if not file.exists():
                    told(f"statistics of {self.names[t]}")
                    assert self.statistic is not None
                    experts = self.models[-len(self.experts) :]
                    save_tensors(file, self.proxy.gather(self.statistic, experts, t, self.base_folder))
            self.engine.statistics = [StoredTensors(f) for f in files]
            self.engine.check_statistics(self.match.merged)
        self.engine.kept = TensorFolder(work / KEPT)
        self.engine.survey(self.match.merged, self.load, lambda name: told(f"looking at {name}"))

    def merged(self, name: str) -> Tensor:
        """One tensor of the result, in the dtype that is computed in."""
        return self.engine.merge(name, *self.load(name))

    def record(self) -> dict[str, Any]:
        """What was merged and how, JSON-ready; two plans with the same record make the same model."""
        settings = {n: dict(self.options(n)) for n in self.match.merged}
        common = next(iter(settings.values()), {})
        varying = any(s != common for s in settings.values())
        sources = [f for m in self.models for f in m.files]
        if self.proxy is not None:
            sources += [self.proxy.file(self.experts, t) for t in range(len(self.experts))]
        return {
            "polytask": polytask.__version__,
            "method": self.method,
            "base": None if self.base is None else str(self.base),
            "experts": [str(e) for e in self.experts],
            "options": None if varying else common,
            "options_by_tensor": settings if varying else None,
            "filters": list(self.filters),
            "skip": list(self.skip),
            "dtype": self.dtype,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "proxy": None if self.proxy is None else {"data": str(self.proxy.data), "model": self.proxy.model},
            "routing": None
            if self.routing is None
            else {"method": self.title, **{o: getattr(self.routing, o) for o in self.routing.method.options}},
            "sources": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sources],
        }


def plan_of(method: str) -> type[MergePlan]:
    """The kind of plan that a method asks for.

    Raises:
        InputError: no such method.
    """
    if merging_method(method).needs != "inputs":
        return MergePlan
    from polytask.merging.adaptive_on_disk import AdaptivePlan  # it runs models, which few plans do

    return AdaptivePlan


def write(
    plan: MergePlan,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
    told: Callable[[str], None] | None = None,
) -> None:
    """Merge as planned into a folder that transformers can load where the base is one.

    Work is done beside the folder, which appears when all of it is there. A merge that was killed goes on with the first file it had not
    finished when the same one is started again; one that fails leaves nothing behind.

    Args:
        plan: what to merge.
        folder: the result: safetensors files, ``merge.json``, and the base's configuration and tokenizer. It may be there and empty.
        overwrite: replace what is there.
        progress: called with the name of each tensor when it is written, also for those that an earlier start had written.
        told: called with what is being done before the first tensor is written.

    Raises:
        InputError: the folder exists, NaN in a tensor, a value too large for the dtype of the result.
        StorageError: a file cannot be read or written.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    check_target(plan, folder, overwrite)
    work = folder.with_name(f".{folder.name}.merging")
    record = plan.record()
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    finished = _finished(work, digest)
    try:
        if len(finished) < len(plan.files) or plan.routing is not None:
            plan.prepare(work, told or (lambda _: None))
        _write_shards(plan, work, digest, finished, progress)
        if len(plan.files) > 1:
            (work / INDEX).write_text(index_of(plan.files, plan.bytes), encoding="utf-8")
        if plan.routing is not None:
            from polytask.merging.routed_on_disk import add_routed_experts  # few plans need what runs models

            (told or (lambda _: None))("adding experts")
            add_routed_experts(plan, work, work / JOURNAL)
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _copy_companions(plan, work)
    except Exception:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for passing in (STATISTICS, KEPT):
        shutil.rmtree(work / passing, ignore_errors=True)
    (work / JOURNAL).unlink(missing_ok=True)
    put(work, folder)


def check_target(plan: MergePlan, folder: Path, overwrite: bool) -> None:
    """Refuse a folder that a result cannot take the place of.

    Raises:
        InputError: it is there and may not be replaced, holds something else than a model, or a model to be merged.
    """
    if folder.exists() and not overwrite and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists already: name another folder, or overwrite it")
    if folder.is_dir() and any(folder.iterdir()) and not _is_model(folder):
        raise InputError(f"{folder} holds {next(folder.iterdir()).name} and no model: name another folder")
    if folder.resolve() in {p.resolve() for m in plan.models for p in (m.path, m.path.parent)}:
        raise InputError(f"{folder} is where a model to be merged lies: name another folder")


def _finished(work: Path, digest: str) -> list[str]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        journal = json.loads((work / JOURNAL).read_text(encoding="utf-8"))
        if journal["plan"] == digest:
            return list(journal["finished"])
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        # known from here on: statistics that are gathered before the first file is finished belong to this plan
        _write_beside(work / JOURNAL, json.dumps({"plan": digest, "finished": []}))
    except OSError as error:
        raise StorageError(
            f"{work.parent} cannot be written to: {(error.strerror or 'unknown reason').lower()}"
        ) from None
    return []


def _write_shards(
    plan: MergePlan, work: Path, digest: str, finished: list[str], progress: Callable[[str], None] | None
) -> None:
    merging = set(plan.match.merged)
    for file, specs in plan.files.items():
        if file not in finished:
            with Writer(work / file, specs) as writer:
                for name, spec in specs.items():
                    writer.add(name, _merged(plan, name, spec) if name in merging else plan.taken(name))
                    if progress is not None:
                        progress(name)
            finished.append(file)
            _write_beside(work / JOURNAL, json.dumps({"plan": digest, "finished": finished}))
        elif progress is not None:
            for name in specs:
                progress(name)


def _merged(plan: MergePlan, name: str, spec: Spec) -> Tensor:
    return written_as(plan.merged(name), spec.torch_dtype, name).reshape(spec.shape)


def _copy_companions(plan: MergePlan, work: Path) -> None:
    """The files that stand beside the weights of a transformers folder: configuration and tokenizer."""
    own = plan.reference
    # the files of an adapter's model lie where its base does
    known = (own.path, plan.models[0].path, *(f.parent for f in own.files))
    source = next((p for p in known if (p / CONFIG).exists()), own.path)
    tokenizer = source if plan.tokenizer is None else fetched(plan.tokenizer)
    for folder, wanted in ((source, False), (tokenizer, True)):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file() and _accompanies(file) and file.name.startswith(TOKENIZER) == wanted:
                shutil.copyfile(file, work / file.name)
    said = configuration(work)
    adapted = plan.configured(said) if said else said
    if adapted != said:
        (work / CONFIG).write_text(json.dumps(adapted, indent=2) + "\n", encoding="utf-8")


def configuration(folder: Path) -> dict[str, Any]:
    """What the configuration in a transformers folder says; nothing where there is none."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_model(folder: Path) -> bool:
    return any(f.name in (RECORD, CONFIG, ADAPTER) or f.suffix in WEIGHTS for f in folder.iterdir())


def _accompanies(file: Path) -> bool:
    # a README tells of the base alone, an index of its files
    is_weights = file.suffix in WEIGHTS or file.name.endswith(".index.json")
    return not (is_weights or file.name.startswith((".", "README")) or file.name == RECORD)


def _write_beside(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def put(work: Path, folder: Path) -> None:
    """Move a finished folder to its place; what was there goes when it has come."""
    aside = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier start that was killed here
        os.replace(folder, aside)
    os.replace(work, folder)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)

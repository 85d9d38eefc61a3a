"""Do these models belong together? Judged by names, shapes and dtypes alone, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

NAMED = 3
"""How many names of tensors an error message lists."""


ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes a number of each dtype that files hold."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor; the dtype goes by its name, so that headers are understood before PyTorch is loaded."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size."""
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        """Whether its elements are numbers with a fraction."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return torch_dtype(self.dtype)


@dataclass(frozen=True)
class Match:
    """Which tensors of a model are merged, and which are taken over as they are.

    Attributes:
        merged: names of the tensors that are merged.
        kept: names of those taken from the base, or from the first expert where there is no base: integers, booleans, skipped ones.
    """

    merged: tuple[str, ...]
    kept: tuple[str, ...]


def skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name fits one of the patterns (``*`` and ``?`` as in file names)."""
    return any(fnmatchcase(name, p) for p in patterns)


def match(
    models: Sequence[tuple[str, Mapping[str, Spec]]], skip: str | Iterable[str] = (), *, mixed_dtypes: bool = False
) -> Match:
    """Compare models with the first of them, tensor by tensor.

    Args:
        models: (label, {tensor name: spec}); the first one is the base, or the first expert.
        skip: one or several patterns of tensors that are not merged, such as task heads; the models may differ in them.
        mixed_dtypes: allow floating-point tensors of one name to differ in dtype.

    Raises:
        InputError: a tensor is missing, superfluous, or differs in shape or dtype; the message names it and the model.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    reference, specs = models[0]
    for label, others in models[1:]:
        _same_names(label, others, reference, specs, skip)
        for name, spec in specs.items():
            if name in others and not skipped(name, skip):
                check_spec(name, label, others[name], reference, spec, mixed_dtypes)
    unmatched = [p for p in skip if not any(fnmatchcase(n, p) for _, m in models for n in m)]
    if unmatched:
        raise InputError(f"no tensor's name fits the skip pattern {unmatched[0]!r}")
    merged = tuple(n for n, s in specs.items() if s.is_floating_point and not skipped(n, skip))
    if not merged:
        raise InputError(f"{reference} has no tensor to merge: all are skipped, or none holds floating-point numbers")
    kept = tuple(n for n in specs if n not in set(merged))
    complex_ones = [n for n in kept if specs[n].dtype.startswith("complex") and not skipped(n, skip)]
    if complex_ones:
        raise InputError(f"the tensor {complex_ones[0]} of {reference} is complex, which no method merges: skip it")
    quantized = [n for n in kept if n.endswith("weight") and not skipped(n, skip)]
    if quantized:
        raise InputError(
            f"the tensor {quantized[0]} of {reference} holds weights as {specs[quantized[0]].dtype}: quantized models are not "
            "merged; take the original weights, or skip it"
        )
    return Match(merged, kept)


def _same_names(label: str, found: Iterable[str], reference: str, wanted: Iterable[str], skip: tuple[str, ...]) -> None:
    found, wanted = set(found), set(wanted)
    for having, lacking, names in ((reference, label, wanted - found), (label, reference, found - wanted)):
        differing = sorted(n for n in names if not skipped(n, skip))
        if differing:
            more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
            raise InputError(
                f"{lacking} has no tensor {', '.join(differing[:NAMED])}{more}, which {having} has: "
                "merge models of one architecture, or skip task heads by a pattern"
            )


def check_spec(name: str, label: str, spec: Spec, reference: str, wanted: Spec, mixed_dtypes: bool) -> None:
    """Refuse a tensor that differs in shape, or in dtype, from one of another model.

    Raises:
        InputError: naming the tensor and both models.
    """
    if spec.shape != wanted.shape:
        raise InputError(
            f"the tensor {name} has shape {list(spec.shape)} in {label} and {list(wanted.shape)} in {reference}: "
            "skip it if it is a task head"
        )
    both_float = spec.is_floating_point and wanted.is_floating_point
    if spec.dtype != wanted.dtype and not (both_float and mixed_dtypes):
        hint = ": name the dtype of the result to merge them all the same" if both_float else ""
        raise InputError(f"the tensor {name} is {spec.dtype} in {label} and {wanted.dtype} in {reference}{hint}")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """``torch.float32`` for ``float32``."""
    found: torch.dtype = getattr(torch, name)
    return found


def spec_of(tensor: Tensor) -> Spec:
    """Shape and dtype of a tensor in memory."""
    return Spec(tuple(tensor.shape), dtype_name(tensor.dtype))


def result_dtype(given: str | torch.dtype) -> str:
    """The name of a dtype that a merged model may have.

    Raises:
        InputError: it is none of float16, bfloat16, float32 and float64.
    """
    name = str(given).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise InputError(f"the dtype of a merged model is float16, bfloat16, float32 or float64, not {name!r}")
    return name


def compute_dtype(dtypes: Iterable[str]) -> str:
    """What a tensor is merged in: float64 where an input is, else float32."""
    return "float64" if "float64" in set(dtypes) else "float32"

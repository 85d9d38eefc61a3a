"""Do these models belong together? Judged by names, shapes and dtypes alone, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from polytask.errors import InputError

NAMED = 3
"""How many names of tensors an error message lists."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n


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
                _same_spec(name, label, others[name], reference, spec, mixed_dtypes)
    unmatched = [p for p in skip if not any(fnmatchcase(n, p) for _, m in models for n in m)]
    if unmatched:
        raise InputError(f"no tensor's name fits the skip pattern {unmatched[0]!r}")
    merged = tuple(n for n, s in specs.items() if s.dtype.is_floating_point and not skipped(n, skip))
    if not merged:
        raise InputError(f"{reference} has no tensor to merge: all are skipped, or none holds floating-point numbers")
    kept = tuple(n for n in specs if n not in set(merged))
    complex_ones = [n for n in kept if specs[n].dtype.is_complex and not skipped(n, skip)]
    if complex_ones:
        raise InputError(f"the tensor {complex_ones[0]} of {reference} is complex, which no method merges: skip it")
    quantized = [n for n in kept if n.endswith("weight") and not skipped(n, skip)]
    if quantized:
        raise InputError(
            f"the tensor {quantized[0]} of {reference} holds weights as {dtype_name(specs[quantized[0]].dtype)}: quantized models are not "
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


def _same_spec(name: str, label: str, spec: Spec, reference: str, wanted: Spec, mixed_dtypes: bool) -> None:
    if spec.shape != wanted.shape:
        raise InputError(
            f"the tensor {name} has shape {list(spec.shape)} in {label} and {list(wanted.shape)} in {reference}: "
            "skip it if it is a task head"
        )
    both_float = spec.dtype.is_floating_point and wanted.dtype.is_floating_point
    if spec.dtype != wanted.dtype and not (both_float and mixed_dtypes):
        hint = ": name the dtype of the result to merge them all the same" if both_float else ""
        raise InputError(
            f"the tensor {name} is {dtype_name(spec.dtype)} in {label} and {dtype_name(wanted.dtype)} in {reference}{hint}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(given: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of a name such as ``bfloat16``.

    Raises:
        InputError: no such dtype.
    """
    name = dtype_name(given) if isinstance(given, torch.dtype) else given
    found = getattr(torch, str(name), None)
    if name not in ("float16", "bfloat16", "float32", "float64") or not isinstance(found, torch.dtype):
        raise InputError(f"the dtype of a merged model is float16, bfloat16, float32 or float64, not {name!r}")
    return found


def compute_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What a tensor is merged in: float64 where an input is, else float32."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32

r"""Do tasks pull the shared parameters apart, more than one task's own mini-batches do?

Gradients of two mini-batches of *one* task disagree too (Elich et al. 2023, arXiv:2311.04698: gradient conflict is not specific to
multi-task learning). A negative cosine between tasks therefore means interference only where it is beyond that null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask.autograd import Shared, jacobian
from polytask.errors import InputError
from polytask.tasks import Tasks
from polytask.training.data import TaskData, epoch_order
from polytask.training.diagnosed import Diagnosed, LossesOf
from polytask.training.diagnosis_shown import heat_map, table

Array = npt.NDArray[np.float64]

#: error rate, over all pairs together, at which a pair is called conflicting
LEVEL = 0.05


@dataclass(frozen=True)
class Diagnosis:
    """What the gradients of a few mini-batches say about interference.

    Attributes:
        tasks: K names, the order of every axis below.
        batches: M, mini-batches looked at.
        cosine: (K, K), mean over mini-batches of the cosine between the shared gradients of tasks i and j **on the same mini-batch**.
        null: (K,), mean cosine between the gradients of one task on two different mini-batches.
        conflict_rate: (K, K), share of those cosines below 0.
        null_conflict_rate: (K,), share of the null's cosines below 0.
        norm: (K,), mean Euclidean norm of the gradient of the shared parameters.
        p_value: (K, K), one-sided p of the test in :func:`diagnose`, before correction for the number of pairs; NaN where untested.
        conflicting: pairs (i, j), i < j, whose conflict exceeds the null.
        sentences: one for each of those pairs, or one that says that there is none; the last names the test.
    """

    tasks: tuple[str, ...]
    batches: int
    cosine: Array
    null: Array
    conflict_rate: Array
    null_conflict_rate: Array
    norm: Array
    p_value: Array
    conflicting: tuple[tuple[int, int], ...]
    sentences: tuple[str, ...]

    def table(self) -> str:
        """Cosines of every pair, with each task's own between mini-batches, how often these conflict, and the gradients' norms."""
        columns = (("own cosine", self.null), ("own conflict", self.null_conflict_rate), ("norm", self.norm))
        return table(self.tasks, self.cosine, columns)

    def heat_map(self) -> str:
        """The cosines as an SVG, each task's own between mini-batches on the diagonal."""
        cells = self.cosine.copy()
        np.fill_diagonal(cells, self.null)
        return heat_map(self.tasks, cells, f"Cosine between task gradients over {self.batches} mini-batches")

    def __str__(self) -> str:
        return "\n".join(
            (f"Cosine between task gradients over {self.batches} mini-batches", self.table(), *self.sentences)
        )

    def _repr_html_(self) -> str:
        return self.heat_map() + "".join(f"<p>{escape(s)}</p>" for s in self.sentences)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-ready, None where a number is unknown."""
        arrays = {
            n: _plain(getattr(self, n).tolist())
            for n in ("cosine", "null", "conflict_rate", "null_conflict_rate", "norm", "p_value")
        }
        pairs = [list(pair) for pair in self.conflicting]
        return {
            "tasks": list(self.tasks),
            "batches": self.batches,
            **arrays,
            "conflicting": pairs,
            "sentences": list(self.sentences),
        }


def diagnose(
    model: nn.Module,
    data: TaskData | Iterable[Any],
    tasks: Tasks | LossesOf | None = None,
    batches: int = 8,
    *,
    batch_size: int = 256,
    seed: int = 0,
    shared: Shared = None,
) -> Diagnosis:
    r"""Compare the conflict between tasks with the conflict between mini-batches of one task.

    On each of M disjoint mini-batches every task's exact gradient with respect to the shared parameters is taken, in evaluation mode (no
    dropout). With :math:`c_m` the cosine of tasks i and j on mini-batch m, and :math:`n_m` the mean cosine of the gradient of
    mini-batch m with those of the other mini-batches within one task, averaged over i and j, the pair is called conflicting where

    - the mean of :math:`c_m` is negative, and
    - the mean of :math:`d_m = n_m - c_m` is positive by a one-sided t test over mini-batches, whose variance takes the shared
      mini-batches into account by the jackknife, at 5 % over all pairs together (Holm).

    Args:
        model: any module that returns {task: output}, or {task: loss}; left as it was.
        data: rows in memory, or an iterable of batches, of which the first ``batches`` are used: (inputs, labels), these by name or one
            after another in the order of the outputs.
        tasks: at least two; or a function (model, batch) -> {task: loss}, for anything else. When omitted, the model's own, or what kinds
            outputs and labels look like: classes, yes or no, numbers.
        batches: M; at least 3 are needed for the test.
        batch_size: rows of a mini-batch (rows in memory only), fewer where the data is short.
        seed: which rows.
        shared: the parameters looked at; when omitted those the model declares, or that at least two losses reach.

    Returns:
        Numbers, sentences, ``table()`` and ``heat_map()``: ``print`` shows the first three, a notebook the last.

    Raises:
        InputError: fewer than two tasks or mini-batches, nothing shared, or losses that cannot be found.

    Cost: M forward passes, M x K backward passes and M x K x P numbers on the host; nothing is drawn from the global generators.
    """
    if isinstance(tasks, Tasks) and len(tasks) < 2:
        raise InputError("interference needs at least two tasks")
    names, rows = _gradients(Diagnosed(model, tasks), data, batches, batch_size, seed, shared)
    M = rows.shape[0]
    norms = rows.norm(dim=2)
    unit = torch.where(
        norms[..., None] > 0, rows / norms[..., None].clamp_min(1e-300), torch.full_like(rows, float("nan"))
    )
    between = torch.einsum("mip,mjp->mij", unit, unit).double().numpy()
    within = torch.einsum("mip,nip->imn", unit, unit).double().numpy()
    off = ~np.eye(M, dtype=bool)
    null_cosines = within[:, off]  # (K, M (M - 1))
    p_value, conflicting = _test(between, within)
    cosine = _mean(between, 0)
    null = _mean(null_cosines, 1)
    rate, null_rate = _rate(between, 0), _rate(null_cosines, 1)
    sentences = _sentences(names, conflicting, cosine, null, rate, null_rate, p_value, M)
    norm = _mean(np.where(norms.numpy() > 0, norms.double().numpy(), np.nan), 0)
    return Diagnosis(names, M, cosine, null, rate, null_rate, norm, p_value, conflicting, sentences)


def _gradients(
    diagnosed: Diagnosed, data: TaskData | Iterable[Any], batches: int, batch_size: int, seed: int, shared: Shared
) -> tuple[tuple[str, ...], Tensor]:
    """Exact gradients of the shared parameters, shape (batches, tasks, P), on the host; zeros for a task without labels there."""
    found: list[dict[str, Tensor]] = []
    parameters: list[Tensor] = []
    was_training = diagnosed.model.training
    diagnosed.model.eval()
    try:
        for batch in _some(data, batches, batch_size, seed):
            with torch.enable_grad():
                losses = diagnosed.losses(batch)
            if not parameters and losses:
                parameters = diagnosed.shared(losses, shared)
            rows = jacobian(list(losses.values()), parameters)[0].cpu().clone() if losses else ()
            found.append(dict(zip(losses, rows, strict=True)))
    finally:
        diagnosed.model.train(was_training)
    if len(found) < 2:
        raise InputError(f"a diagnosis of interference needs at least two mini-batches, and there are {len(found)}")
    names = tuple(diagnosed.tasks or dict.fromkeys(n for each in found for n in each))
    if len(names) < 2:
        raise InputError("interference needs at least two tasks")
    nothing = torch.zeros(sum(p.numel() for p in parameters))
    return names, torch.stack([torch.stack([each.get(n, nothing) for n in names]) for each in found])


def _some(data: TaskData | Iterable[Any], batches: int, batch_size: int, seed: int) -> Iterator[Any]:
    """The first mini-batches of an iterable, or disjoint random ones of rows in memory."""
    if not isinstance(data, TaskData):
        yield from islice(data, batches)
        return
    size = max(1, min(batch_size, len(data) // batches))
    order = epoch_order(len(data), seed, 0)
    for m in range(min(batches, len(data) // size)):
        part = data.rows(order[m * size : (m + 1) * size])
        yield part.inputs, part.targets


def _test(between: Array, within: Array) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """p values of all pairs, and the pairs that are called conflicting: between (M, K, K), within (K, M, M)."""
    K = between.shape[1]
    p = np.full((K, K), np.nan)
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    for i, j in pairs:
        p[i, j] = p[j, i] = _jackknife_p(between[:, i, j], (within[i] + within[j]) / 2)
    tested = sorted((p[i, j], (i, j)) for i, j in pairs if np.isfinite(p[i, j]))
    found = []
    for rank, (value, (i, j)) in enumerate(tested):
        if value > LEVEL / (len(tested) - rank):
            break
        if np.nanmean(between[:, i, j]) < 0:
            found.append((i, j))
    return p, tuple(sorted(found))


def _jackknife_p(c: Array, n: Array) -> float:
    """One-sided p that the mean of n over pairs of mini-batches exceeds the mean of c over mini-batches: c (M,), n (M, M)."""
    from scipy.stats import t

    kept = np.flatnonzero(np.isfinite(c) & np.isfinite(np.diag(n)))
    M = len(kept)
    if M < 3:
        return math.nan
    c, n = c[kept], n[np.ix_(kept, kept)]
    pairs = n.sum() - np.trace(n)
    row = n.sum(1) - np.diag(n)
    difference = pairs / (M * (M - 1)) - c.mean()
    without = (pairs - 2 * row) / ((M - 1) * (M - 2)) - (c.sum() - c) / (M - 1)
    error = math.sqrt((M - 1) / M * float(((without - without.mean()) ** 2).sum()))
    if error <= 1e-12 * abs(difference):
        return 0.0 if difference > 0 else 1.0
    return float(t.sf(difference / error, M - 1))


def _sentences(
    names: tuple[str, ...],
    conflicting: tuple[tuple[int, int], ...],
    cosine: Array,
    null: Array,
    rate: Array,
    null_rate: Array,
    p: Array,
    M: int,
) -> tuple[str, ...]:
    found = [
        f"{names[i]} and {names[j]} pull the shared parameters apart: mean cosine {cosine[i, j]:.2f} (conflict in {rate[i, j]:.0%} of "
        f"mini-batches) against {(null[i] + null[j]) / 2:.2f} ({(null_rate[i] + null_rate[j]) / 2:.0%}) between mini-batches of one task, "
        f"p = {p[i, j]:.2g}."
        for i, j in conflicting
    ]
    if not found:
        found = ["No pair of tasks conflicts more than mini-batches of one task do."]
    how = (
        f"Test: one-sided jackknife t over {M} mini-batches, of the mean within-task cosine between mini-batches minus the "
        f"cosine between the tasks, where the latter is negative; {LEVEL:.0%} over all pairs (Holm)."
    )
    return (*found, how)


def _mean(values: Array, axis: int) -> Array:
    known = np.isfinite(values)
    count = known.sum(axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def _rate(cosines: Array, axis: int) -> Array:
    return _mean(np.where(np.isfinite(cosines), (cosines < 0).astype(float), np.nan), axis)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if math.isfinite(value) else None

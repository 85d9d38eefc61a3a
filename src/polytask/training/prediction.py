"""Predict with a finished run: its model folder written and read without pickle, new rows, and intervals that hold their promise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from polytask.data import TableEncoder, encode_targets
from polytask.errors import InputError, StorageError
from polytask.models.tabular import tabular_model
from polytask.tasks import Binary, Count, Multiclass, Multilabel, Ordinal, Quantile, Regression, Task, Tasks
from polytask.training.evaluation import predict_outputs
from polytask.training.run_folder import MODEL

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

DESCRIPTION, WEIGHTS, CONFORMAL = "model.json", "model.safetensors", "conformal.safetensors"


@dataclass(frozen=True)
class Part:
    """One network of a run: the tasks that share it, the options that rebuild it, its weights."""

    tasks: tuple[str, ...]
    options: dict[str, Any]
    weights: Mapping[str, torch.Tensor]


def conformal_scores(task: Task, y: Array, prediction: Array) -> Floats | None:
    r"""How far labels lay from predictions, ascending: what split conformal intervals are made of.

    :math:`|y - \hat y|` for regression; :math:`|\sqrt y - \sqrt{\hat y}|` for counts, whose spread grows like the root of the mean.

    Args:
        task: of which kind.
        y: labels of rows no weight was fitted on, NaN = missing.
        prediction: for the same rows.

    Returns:
        Shape (labelled rows,); None for a kind that has no such intervals.
    """
    if not isinstance(task.kind, Regression | Count):
        return None
    known = ~np.isnan(y)
    y, p = y[known].astype(np.float64), prediction[known].astype(np.float64)
    return np.sort(np.abs(np.sqrt(y) - np.sqrt(p)) if isinstance(task.kind, Count) else np.abs(y - p))


def conformal_radius(scores: Floats, level: float) -> float:
    r"""The radius that covers a new exchangeable row with at least the given probability.

    .. math:: q = s_{(\lceil (n + 1)\,\text{level} \rceil)}

    Infinite where n rows are too few for the level. Source: Lei et al., JASA 2018 (arXiv:1604.04173).
    """
    rank = int(np.ceil((len(scores) + 1) * level - 1e-9))
    return float(scores[rank - 1]) if rank <= len(scores) else float("inf")


def save_model(
    folder: Path,
    parts: Sequence[Part],
    tasks: Tasks,
    encoder: TableEncoder,
    scores: Mapping[str, Floats],
    not_features: Sequence[str],
) -> None:
    """Write everything prediction needs, whole or not at all.

    Args:
        folder: is replaced if it exists.
        parts: the networks, which together serve every task.
        tasks: all tasks.
        encoder: of the features.
        scores: {task: :func:`conformal_scores`}.
        not_features: columns of the training table that a table to predict may have and that are not read.
    """
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    beside = folder.with_name(f".{folder.name}.part")
    names = list(tasks)
    description = {
        "format": 1,
        "tasks": tasks.to_json(),
        "models": [{"tasks": list(p.tasks), "options": p.options} for p in parts],
        "not_features": list(not_features),
    }
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        encoder.save(beside)
        save_file(
            {f"{i}/{n}": t.contiguous() for i, p in enumerate(parts) for n, t in p.weights.items()}, beside / WEIGHTS
        )
        save_arrays({str(names.index(t)): s for t, s in scores.items()}, beside / CONFORMAL)
        (beside / DESCRIPTION).write_text(json.dumps(description, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except OSError as error:
        raise StorageError(f"the model cannot be written to {folder}: {error}") from error


class Predictor:
    """The model of a finished run.

    Args:
        folder: of the run.

    Raises:
        InputError: there is no finished run.
        StorageError: a file of its model is missing or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file as load_arrays
        from safetensors.torch import load_file

        self.folder = Path(folder) / MODEL
        if not (self.folder / DESCRIPTION).is_file():
            raise InputError(f"there is no model in {folder}: it is not the folder of a finished run")
        self.encoder = TableEncoder.load(self.folder)
        try:
            about = json.loads((self.folder / DESCRIPTION).read_text())
            self.tasks = Tasks.from_json(about["tasks"])
            self.not_features: list[str] = about["not_features"]
            weights = load_file(self.folder / WEIGHTS)
            names = list(self.tasks)
            self.scores = {names[int(k)]: s for k, s in load_arrays(self.folder / CONFORMAL).items()}
            self.models = []
            for i, part in enumerate(about["models"]):
                model = tabular_model(self.encoder.spec, self.tasks.only(part["tasks"]), **part["options"])
                model.load_state_dict({n.partition("/")[2]: t for n, t in weights.items() if n.startswith(f"{i}/")})
                self.models.append((model, self.tasks.only(part["tasks"])))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise StorageError(f"the model in {self.folder} is damaged: {' '.join(str(error).split())}") from error

    def outputs(self, frame: pd.DataFrame) -> dict[str, dict[str, Array]]:
        """Decoded outputs of every task, see :func:`~polytask.training.evaluation.predict_outputs`.

        Raises:
            InputError: the table lacks a feature, or a label in it is of a class unseen in training.
        """
        present = [n for n in self.tasks if n in frame.columns]
        if present:
            encode_targets(frame, self.tasks.only(present))  # labels are not needed, but must not contradict the model
        rest = [c for c in (*self.tasks, *self.not_features) if c in frame.columns]
        inputs = self.encoder.transform(frame.drop(columns=rest)).tensors()
        found: dict[str, dict[str, Array]] = {}
        for model, tasks in self.models:
            found |= predict_outputs(model, tasks, inputs)
        return {n: found[n] for n in self.tasks}

    def predict(self, frame: pd.DataFrame, intervals: float | None = None) -> pd.DataFrame:
        """See :func:`predict`."""
        import pandas as pd

        if intervals is not None and not 0 < intervals < 1:
            raise InputError(f"the coverage of intervals lies between 0 and 1, not at {intervals}")
        columns: dict[str, Array] = {}
        for name, decoded in self.outputs(frame).items():
            columns |= _columns(self.tasks[name], decoded)
            if intervals is not None and name in self.scores:
                columns |= self._interval(self.tasks[name], decoded["prediction"], intervals)
        return pd.DataFrame(columns, index=frame.index)

    def _interval(self, task: Task, prediction: Array, level: float) -> dict[str, Array]:
        radius, p = conformal_radius(self.scores[task.name], level), prediction.astype(np.float64)
        low, high = p - radius, p + radius
        if isinstance(task.kind, Count):
            low, high = np.maximum(np.sqrt(p) - radius, 0) ** 2, (np.sqrt(p) + radius) ** 2
        return {f"{task.name}_low": low, f"{task.name}_high": high}


def _columns(task: Task, decoded: Mapping[str, Array]) -> dict[str, Array]:
    name, kind, prediction = task.name, task.kind, decoded["prediction"]
    if isinstance(kind, Quantile):
        middle = int(np.argmin(np.abs(np.array(kind.quantiles) - 0.5)))
        return {
            name: prediction[:, middle],
            **{f"{name}_quantile_{q:g}": prediction[:, j] for j, q in enumerate(kind.quantiles)},
        }
    if isinstance(kind, Multilabel):
        p, labels = decoded["probability"], task.classes or tuple(range(kind.n_labels))
        chosen = np.array(
            [";".join(str(label) for label, on in zip(labels, row, strict=True) if on) for row in prediction],
            dtype=object,
        )
        return {name: chosen, **{f"{name}_probability_{label}": p[:, j] for j, label in enumerate(labels)}}
    if isinstance(kind, Binary | Multiclass | Ordinal):
        p = decoded["probability"]
        p = np.stack([1 - p, p], axis=1) if p.ndim == 1 else p
        classes = task.classes or tuple(range(p.shape[1]))
        named = np.array(classes) if len({type(c) for c in classes}) == 1 else np.array(classes, dtype=object)
        return {name: named[prediction], **{f"{name}_probability_{c}": p[:, j] for j, c in enumerate(classes)}}
    return {name: prediction.astype(np.float64)}


def predict(folder: Path | str, frame: pd.DataFrame, intervals: float | None = None) -> pd.DataFrame:
    """Predict every target of a finished run on new rows.

    Args:
        folder: of the run.
        frame: has every feature column of the training table; target columns may be there and are not read.
        intervals: coverage of split conformal intervals for regression and count targets, e.g. 0.9. It holds for rows like those of
            the run, up to the little that choosing the model on the same validation rows takes away.

    Returns:
        One row a row, the same index: ``<task>`` (class or number), ``<task>_probability_<class>``, ``<task>_low`` and
        ``<task>_high`` where intervals were asked for, ``<task>_quantile_<q>`` for quantile targets.

    Raises:
        InputError: no finished run, a missing or unknown column, infinite features, coverage outside (0, 1).
        StorageError: a damaged model.
    """
    return Predictor(folder).predict(frame, intervals)

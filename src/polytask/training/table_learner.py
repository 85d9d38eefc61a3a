"""What the scikit-learn estimators share: checking a table, training on it, reading the network's outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    MultiOutputMixin,
    TransformerMixin,
)
from sklearn.metrics import r2_score
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from polytask.balancing import Balancer, make
from polytask.data import TableEncoder
from polytask.errors import InputError
from polytask.models.tabular import tabular_model
from polytask.tasks import Tasks
from polytask.training.config import TrainConfig
from polytask.training.data import TaskData
from polytask.training.loop import train
from polytask.training.progress import Progress
from polytask.training.target_columns import KIND_NAMES, TargetColumns

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]

FEWEST_ROWS_TO_STOP_EARLY = 1000
"""With ``early_stopping="auto"``: below, a validation part would be mostly noise, and all rows are trained on."""


class TableLearner(TransformerMixin, ClassNamePrefixFeaturesOutMixin, MultiOutputMixin, BaseEstimator):  # type: ignore[misc]
    """What the three estimators share; their docstrings say what the parameters mean."""

    _allowed_kinds: ClassVar[tuple[str, ...]] = KIND_NAMES

    def __init__(
        self,
        *,
        task_types: Mapping[str, str] | str | None = None,
        balancer: str | Mapping[str, Any] | Balancer = "equal",
        epochs: int = 60,
        batch_size: int | str = "auto",
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.15,
        patience: int = 8,
        width: int = 192,
        depth: int = 2,
        dropout: float = 0.1,
        missing_label: int | None = -1,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.task_types = task_types
        self.balancer = balancer
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.missing_label = missing_label
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Any:
        """Learn all targets together.

        Args:
            X: (rows, features), array or DataFrame; missing values, text, categories and dates are encoded.
            y: (rows,) or (rows, tasks), array or DataFrame; missing labels are NaN or None, or for classes ``missing_label``.

        Returns:
            The estimator itself.

        Raises:
            InputError: a ValueError whose sentence names the column or task: infinite values, a task without labels or with one
                class only, a kind that does not fit.
        """
        frame = self._table(X, y=y, reset=True)
        columns = TargetColumns.learn(y, self.task_types, self._allowed_kinds, self.missing_label)
        targets = columns.encode(y)
        check_consistent_length(frame, next(iter(targets.values())))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        training, validation = self._split(targets, columns.tasks, seed)
        encoder = TableEncoder().fit(frame.iloc[training])
        model = tabular_model(
            encoder.spec, columns.tasks, width=self.width, depth=self.depth, dropout=self.dropout, seed=seed
        )
        result = train(
            model,
            columns.tasks,
            self._data(encoder, frame, targets, training),
            self._data(encoder, frame, targets, validation) if len(validation) else None,
            balancer=self._make_balancer(),
            config=self._config(len(training), seed, stops=len(validation) > 0),
            progress=_print_epoch if self.verbose else None,
        )
        model.features.clear()  # the last step's graph, which no pickle can hold
        # predictions in double precision do not depend on how rows are batched
        self.model_ = model.to("cpu").double().eval()
        self.encoder_, self._columns = encoder, columns
        self.tasks_ = columns.tasks
        self.n_outputs_ = len(columns.tasks)
        self._n_features_out = self.width
        self.history_, self.best_epoch_ = result.history, result.best_epoch
        if any(c is not None for c in columns.classes):
            self.classes_ = columns.classes[0] if self.n_outputs_ == 1 else list(columns.classes)
        return self

    def predict(self, X: Any) -> Any:
        """Classes in the labels of ``y``, numbers in its units.

        Args:
            X: (rows, features), as in ``fit``.

        Returns:
            Shaped like ``y`` in ``fit``: (rows,) or (rows, tasks); a DataFrame with the index of ``X`` where ``y`` was one.
        """
        decoded = self._decoded(X)
        index = X.index if isinstance(X, pd.DataFrame) else None
        return self._columns.decode({n: d["prediction"] for n, d in decoded.items()}, index)

    @torch.no_grad()
    def transform(self, X: Any) -> Array:
        """The representation that all tasks share.

        Args:
            X: (rows, features), as in ``fit``.

        Returns:
            (rows, width), float64; a DataFrame after ``set_output(transform="pandas")``.
        """
        z: Array = np.concatenate([self.model_.trunk(inputs).numpy() for inputs in self._batches(X)])
        return z

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Mean over the tasks of accuracy (classes) or R2 (numbers), each on the rows where its label is known.

        Args:
            X: (rows, features).
            y: as in ``fit``; tasks without any known label here are left out.
            sample_weight: (rows,).
        """
        predicted = self._columns_of(self.predict(X))
        check_consistent_length(predicted[0], y, sample_weight)
        weight = None if sample_weight is None else np.asarray(sample_weight)
        scores = []
        for guess, column, labels, known in zip(
            predicted, self._columns.columns(y), self._columns.classes, self._columns.known(y), strict=True
        ):
            if known.any():
                judge = r2_score if labels is None else _accuracy
                w = None if weight is None else weight[known]
                scores.append(judge(column[known], guess[known], sample_weight=w))
        if not scores:
            raise InputError("y has no label at all: there is nothing to score against")
        return float(np.mean(scores))

    def _columns_of(self, predictions: Any) -> list[Array]:
        return [c.to_numpy() for c in self._columns.columns(predictions)]

    def _probabilities(self, X: Any) -> Any:
        decoded = self._decoded(X)
        found = [self._two_columns(decoded[n].get("probability")) for n in self.tasks_]
        return found[0] if self.n_outputs_ == 1 else found

    @staticmethod
    def _two_columns(p: Array | None) -> Array | None:
        if p is None or p.ndim == 2:
            return p
        return np.stack([1.0 - p, p], axis=1)

    @torch.no_grad()
    def _decoded(self, X: Any) -> dict[str, dict[str, Array]]:
        """{task: {"prediction" and "probability": float64 arrays}}."""
        parts = [self.model_(inputs) for inputs in self._batches(X)]
        outputs = {n: torch.cat([part[n] for part in parts]) for n in self.tasks_}
        return {n: {k: v.numpy() for k, v in task.kind.decode(outputs[n]).items()} for n, task in self.tasks_.items()}

    def _batches(self, X: Any, rows: int = 8192) -> list[dict[str, torch.Tensor]]:
        check_is_fitted(self)
        tensors = self.encoder_.transform(self._table(X, reset=False)).tensors()
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        parts = {n: torch.split(t, rows) for n, t in tensors.items()}
        return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]

    def _table(self, X: Any, *, reset: bool, y: Any = "no_validation") -> pd.DataFrame:
        """``X`` as a DataFrame with text for column names, checked against what was seen in ``fit`` unless ``reset``."""
        if y is None:
            validate_data(self, X, None, skip_check_array=True)  # says that y is required
        names = [str(c) for c in X.columns] if isinstance(X, pd.DataFrame) else None
        if names is not None and not all(_plain_number(t) for t in X.dtypes):
            validate_data(self, X, reset=reset, skip_check_array=True)
            if len(X) < (least := 2 if reset else 1):
                raise InputError(f"X has {len(X)} rows; at least {least} are needed")
            named: pd.DataFrame = X.set_axis(names, axis=1).reset_index(drop=True)
            return named
        text = names is None and _holds_text(X)
        values = validate_data(
            self,
            X,
            reset=reset,
            dtype=None if text else "numeric",
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )
        frame = pd.DataFrame(values)
        frame.columns = pd.Index(names or [f"x{i}" for i in range(values.shape[1])])
        return frame.infer_objects() if text else frame

    def _split(self, targets: Mapping[str, Array], tasks: Tasks, seed: int) -> tuple[Indices, Indices]:
        """Rows to train on and rows to stop early on, of those with a label."""
        if not 0.0 < self.validation_fraction < 1.0:
            raise InputError(f"validation_fraction lies between 0 and 1, not {self.validation_fraction}")
        known = np.stack([task.kind.labelled(torch.from_numpy(targets[n])).numpy() for n, task in tasks.items()])
        rows = np.flatnonzero(known.any(0))
        stops = len(rows) >= FEWEST_ROWS_TO_STOP_EARLY if self.early_stopping == "auto" else bool(self.early_stopping)
        if not stops:
            return rows, np.empty(0, np.intp)
        held = _held_out(
            {n: t[rows] for n, t in targets.items()}, self.validation_fraction, np.random.default_rng(seed)
        )
        return rows[~held], rows[held]

    def _data(self, encoder: TableEncoder, frame: pd.DataFrame, targets: dict[str, Array], rows: Array) -> TaskData:
        inputs = encoder.transform(frame.iloc[rows]).tensors()
        return TaskData(inputs, {n: torch.from_numpy(t[rows]) for n, t in targets.items()})

    def _make_balancer(self) -> Balancer | str:
        if isinstance(self.balancer, str):
            return make(self.balancer)
        if isinstance(self.balancer, Mapping):
            options = dict(self.balancer)
            if "name" not in options:
                raise InputError('a balancer given as a mapping holds its name: {"name": "famo", ...}')
            return make(options.pop("name"), **options)
        return copy.deepcopy(self.balancer)  # a parameter is never changed by fit

    def _config(self, rows: int, seed: int, stops: bool) -> TrainConfig:
        batch = self.batch_size
        if batch == "auto":
            batch = int(np.clip(2 ** np.floor(np.log2(max(rows, 1) / 20)), 16, 512))
        return TrainConfig(
            epochs=self.epochs,
            batch_size=int(batch),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            patience=self.patience if stops else None,
            stop_on="delta_m" if stops else None,
            schedule="constant" if stops else "cosine",
            seed=seed,
            device=self.device,
        )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.allow_nan = True
        return tags


def _accuracy(y: pd.Series, predicted: Array, sample_weight: Array | None) -> float:
    # compared as objects: a column of text may come back in another dtype of text
    hits = y.to_numpy(dtype=object) == predicted.astype(object)
    return float(np.average(hits, weights=sample_weight))


def _plain_number(dtype: Any) -> bool:
    return pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype)


def _holds_text(X: Any) -> bool:
    """Whether an array or nested list has text in it; its other cells must then be numbers or missing."""
    if not isinstance(X, np.ndarray | list | tuple):
        return False
    values = np.asarray(X, dtype=None if isinstance(X, np.ndarray) else object)
    if values.dtype.kind in "US":
        return True
    if values.dtype.kind != "O" or not any(isinstance(cell, str) for cell in values.flat):
        return False
    for cell in values.flat:
        if not pd.api.types.is_scalar(cell):
            raise TypeError(f"every cell argument must be a string, a number or a date, not {type(cell).__name__}")
    return True


def _held_out(
    targets: Mapping[str, Array], fraction: float, random: np.random.Generator, rare: int = 5
) -> npt.NDArray[np.bool_]:
    """Every (1/fraction)-th row in an order in which rows of like labels are neighbours; rows of a rare class are never held out."""
    rows = len(next(iter(targets.values())))
    keys, keep = [], np.zeros(rows, bool)
    for labels in targets.values():
        values, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True, equal_nan=True)
        if len(values) > 50:  # numbers: fifths of them
            inverse = np.argsort(np.argsort(labels, kind="stable")) * 5 // rows
        else:
            keep |= counts[inverse] < rare
        keys.append(inverse)
    order = np.lexsort((random.permutation(rows), *reversed(keys)))
    order = order[~keep[order]]
    place = np.floor((np.arange(len(order)) + random.random() / fraction) * fraction)
    held = np.zeros(rows, bool)
    held[order[np.diff(place, prepend=place[:1]) > 0]] = True
    return held


def _print_epoch(progress: Progress) -> None:
    losses = "  ".join(f"{n} {v:.4g}" for n, v in progress.train_loss.items() if v is not None)
    score = "" if progress.score is None else f"  validation {progress.score:.4f}"
    print(f"epoch {progress.epoch}/{progress.epochs}  {losses}{score}")

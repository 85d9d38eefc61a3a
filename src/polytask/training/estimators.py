"""Multi-task learning as scikit-learn estimators: many targets in ``y``, some of their labels missing.

:class:`MultiTaskClassifier` learns classes only, :class:`MultiTaskRegressor` numbers only, :class:`MultiTaskEstimator` both.
A one-dimensional ``y`` is one task.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import Tags

from polytask.training.table_learner import TableLearner
from polytask.training.target_columns import CLASS_KINDS, NUMBER_KINDS

Array = npt.NDArray[Any]


class MultiTaskClassifier(ClassifierMixin, TableLearner):  # type: ignore[misc]
    """One network for several classifications of the same rows.

    Args:
        task_types: {column of y: ``binary``, ``multiclass`` or ``ordinal``}, or one of these for all; the number of classes decides
            otherwise. Ordinal needs numbers or ordered categoricals.
        balancer: how the tasks share the trunk: the name of a registered method, ``{"name": ..., option: value, ...}``, or a
            balancer object.
        epochs: passes over the training rows at most.
        batch_size: rows a step; ``auto`` takes about a twentieth of the rows, a power of two from 16 to 512.
        learning_rate: of AdamW; constant with early stopping, down to 0 along a cosine without.
        weight_decay: of AdamW.
        early_stopping: keep the epoch that is best on held-out rows; ``auto`` does so from 1000 rows on.
        validation_fraction: share of rows held out for early stopping.
        patience: epochs without improvement before training stops.
        width: units of each hidden layer, and of the shared representation.
        depth: blocks of the trunk.
        dropout: share of units silenced in training.
        missing_label: marks a missing label in columns of numbers besides NaN; None where there is no such number. In a column that
            would be left with a single class it is a class (the labels -1 and +1).
        device: where training happens: ``auto``, ``cpu``, ``cuda`` or ``mps``; the fitted model lies on the CPU.
        random_state: seed, or generator, of everything random in ``fit``.
        verbose: 1 prints a line an epoch.

    Attributes:
        classes_: the labels in the order of the columns of ``predict_proba``; for several tasks a list of arrays, one a task.
        n_outputs_: number of tasks.
        tasks_: their names, kinds and classes.
        n_features_in_: number of columns of ``X``.
        feature_names_in_: their names, where all are text.
        model_: the network, in double precision.
        encoder_: what turns ``X`` into its inputs.
        history_: losses, metrics and weights by epoch.
        best_epoch_: the epoch whose weights were kept.

    Example:
        >>> import numpy as np, polytask
        >>> X = np.random.default_rng(0).normal(size=(200, 3))
        >>> Y = np.stack([X[:, 0] > 0, X[:, 0] + X[:, 1] > 0], axis=1).astype(float)
        >>> Y[:150, 1] = np.nan
        >>> model = polytask.MultiTaskClassifier(epochs=20, random_state=0).fit(X, Y)
        >>> [p.shape for p in model.predict_proba(X)]
        [(200, 2), (200, 2)]
    """

    _allowed_kinds = CLASS_KINDS
    score = TableLearner.score  # the mixin's knows neither several classifications nor missing labels

    def predict_proba(self, X: Any) -> Array | list[Array]:
        """Probability of every class.

        Args:
            X: (rows, features), as in ``fit``.

        Returns:
            (rows, classes) in the order of ``classes_``; a list of such arrays, one a task, for several tasks.
        """
        probabilities: Array | list[Array] = self._probabilities(X)
        return probabilities

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MultiTaskRegressor(RegressorMixin, TableLearner):  # type: ignore[misc]
    """One network for several numbers about the same rows.

    Missing labels are NaN, and nothing else. Parameters and attributes are those of :class:`MultiTaskClassifier`, except that
    ``task_types`` are ``regression`` (squared error; what is assumed) or ``count`` (Poisson deviance), and that there are no ``classes_``.
    """

    _allowed_kinds = NUMBER_KINDS
    score = TableLearner.score  # the mixin's knows no missing labels


class MultiTaskEstimator(TableLearner):
    """One network for classes and numbers together.

    The kind of each column of ``y`` is inferred (two values: binary; text, categories and whole numbers of at most ten values:
    multiclass; other numbers: count or regression, see :func:`polytask.data.infer_tasks`) unless ``task_types={"column": kind}`` tells it.
    The other parameters and the attributes are those of :class:`MultiTaskClassifier`; entries of ``classes_`` are None for numbers.
    """

    def predict_proba(self, X: Any) -> Array | list[Array | None] | None:
        """Probability of every class: like :meth:`MultiTaskClassifier.predict_proba`, None for tasks that are numbers."""
        probabilities: Array | list[Array | None] | None = self._probabilities(X)
        return probabilities

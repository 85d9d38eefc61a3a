"""What is learnt: kinds of task, losses of each example, metrics, missing labels."""

from polytask.tasks.kinds import (
    KINDS,
    Binary,
    Count,
    Kind,
    Multiclass,
    Multilabel,
    Ordinal,
    Quantile,
    Regression,
    kind_from_json,
)
from polytask.tasks.metric import Metric, as_metric
from polytask.tasks.task import Task, Tasks

__all__ = [
    "KINDS",
    "Binary",
    "Count",
    "Kind",
    "Metric",
    "Multiclass",
    "Multilabel",
    "Ordinal",
    "Quantile",
    "Regression",
    "Task",
    "Tasks",
    "as_metric",
    "kind_from_json",
]

"""polytask: train, balance, navigate, merge and judge models that serve several tasks at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_exports = {
    "Task": "polytask.tasks",
    "Tasks": "polytask.tasks",
    "MultiTaskModel": "polytask.models",
    "wrap": "polytask.models",
    "backward": "polytask.balancing",
    "backward_batches": "polytask.balancing",
    "step": "polytask.balancing",
    "diagnose": "polytask.training",
    "train": "polytask.training",
    "TaskData": "polytask.training",
    "TrainConfig": "polytask.training",
    "MultiTaskClassifier": "polytask.training",
    "MultiTaskRegressor": "polytask.training",
    "MultiTaskEstimator": "polytask.training",
    "PolytaskError": "polytask.errors",
    "InputError": "polytask.errors",
    "TrainingError": "polytask.errors",
}
_modules = (
    "autograd",
    "balancing",
    "data",
    "lightning",
    "linalg",
    "merging",
    "metrics",
    "models",
    "optim",
    "recipes",
    "report",
    "tasks",
    "training",
)

__all__ = ["__version__", *_exports]

if TYPE_CHECKING:
    from polytask.balancing import backward as backward
    from polytask.balancing import backward_batches as backward_batches
    from polytask.balancing import step as step
    from polytask.errors import InputError as InputError
    from polytask.errors import PolytaskError as PolytaskError
    from polytask.errors import TrainingError as TrainingError
    from polytask.models import MultiTaskModel as MultiTaskModel
    from polytask.models import wrap as wrap
    from polytask.tasks import Task as Task
    from polytask.tasks import Tasks as Tasks
    from polytask.training import MultiTaskClassifier as MultiTaskClassifier
    from polytask.training import MultiTaskEstimator as MultiTaskEstimator
    from polytask.training import MultiTaskRegressor as MultiTaskRegressor
    from polytask.training import TaskData as TaskData
    from polytask.training import TrainConfig as TrainConfig
    from polytask.training import diagnose as diagnose
    from polytask.training import train as train


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: nothing is loaded before it is asked for, so that `polytask --help` answers at once
    if name in _exports:
        return getattr(importlib.import_module(_exports[name]), name)
    if name in _modules:
        return importlib.import_module(f"polytask.{name}")
    raise AttributeError(f"module 'polytask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_exports, *_modules})

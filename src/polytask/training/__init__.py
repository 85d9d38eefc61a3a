"""Training: the loop, its checkpoints, the diagnosis of interference, the study and the estimators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# loaded on first use: the loop needs torch, the estimators scikit-learn, and `polytask --help` neither
_exports = {
    "TrainConfig": "config",
    "TaskData": "data",
    "Interrupted": "loop",
    "TrainResult": "loop",
    "train": "loop",
    "Progress": "progress",
    "predict_outputs": "evaluation",
    "evaluate": "evaluation",
    "Diagnosis": "diagnosis",
    "diagnose": "diagnosis",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "run_study": "study",
    "load_run": "study",
    "predict": "study",
    "Study": "study",
    "MultiTaskClassifier": "estimators",
    "MultiTaskRegressor": "estimators",
    "MultiTaskEstimator": "estimators",
}

__all__ = list(_exports)

if TYPE_CHECKING:
    from polytask.training.checkpoint import load_checkpoint as load_checkpoint
    from polytask.training.checkpoint import save_checkpoint as save_checkpoint
    from polytask.training.config import TrainConfig as TrainConfig
    from polytask.training.data import TaskData as TaskData
    from polytask.training.diagnosis import Diagnosis as Diagnosis
    from polytask.training.diagnosis import diagnose as diagnose
    from polytask.training.evaluation import evaluate as evaluate
    from polytask.training.evaluation import predict_outputs as predict_outputs
    from polytask.training.loop import Interrupted as Interrupted
    from polytask.training.loop import TrainResult as TrainResult
    from polytask.training.loop import train as train
    from polytask.training.progress import Progress as Progress


def __getattr__(name: str) -> Any:
    if name in _exports:
        return getattr(importlib.import_module(f"polytask.training.{_exports[name]}"), name)
    raise AttributeError(f"module 'polytask.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_exports})

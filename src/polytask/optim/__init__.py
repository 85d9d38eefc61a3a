"""Optimizers that know of tasks."""

from polytask.optim.adatask import AdaTask
from polytask.optim.alternation import turns
from polytask.optim.dualoptim_plus import DualOptimPlus
from polytask.optim.metric_aware_adam import MAdam, MetricAwareAdam
from polytask.optim.mtadam import MTAdam
from polytask.optim.task_optimizer import TaskOptimizer

__all__ = ["AdaTask", "DualOptimPlus", "MAdam", "MTAdam", "MetricAwareAdam", "TaskOptimizer", "turns"]

"""Optimizers that know of tasks."""

from polytask.optim.alternation import turns
from polytask.optim.dualoptim_plus import DualOptimPlus
from polytask.optim.metric_aware_adam import MAdam, MetricAwareAdam

__all__ = ["DualOptimPlus", "MAdam", "MetricAwareAdam", "turns"]

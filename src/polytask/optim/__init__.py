"""Optimizers that know of tasks."""

from polytask.optim.metric_aware_adam import MAdam, MetricAwareAdam

__all__ = ["MAdam", "MetricAwareAdam"]

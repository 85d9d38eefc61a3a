"""Sharing patterns: which parameters serve which tasks."""

from polytask.models.base import HardSharing, MultiTaskModel, Wrapped, wrap
from polytask.models.tabular import TabularModel, tabular_model

__all__ = ["HardSharing", "MultiTaskModel", "TabularModel", "Wrapped", "tabular_model", "wrap"]

"""Sharing patterns: which parameters serve which tasks."""

from polytask.models.base import HardSharing, MultiTaskModel, Wrapped, wrap

__all__ = ["HardSharing", "MultiTaskModel", "Wrapped", "wrap"]

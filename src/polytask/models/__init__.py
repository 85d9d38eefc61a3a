"""Sharing patterns: which parameters serve which tasks."""

from polytask.models.base import HardSharing, MultiTaskModel, Wrapped, wrap
from polytask.models.recon import BranchedModel, Recon
from polytask.models.rotograd import RotoGrad
from polytask.models.tabular import TabularModel, tabular_model

__all__ = [
    "BranchedModel",
    "HardSharing",
    "MultiTaskModel",
    "Recon",
    "RotoGrad",
    "TabularModel",
    "Wrapped",
    "tabular_model",
    "wrap",
]

"""Several fine-tuned models -> one model: one file a method, tensor by tensor."""

from __future__ import annotations

from polytask.merging.adaptive import adapt
from polytask.merging.base import Filter, MatrixMerger, Merger, Place, TaskVectorMerger, WeightMerger
from polytask.merging.esm_pp import route
from polytask.merging.in_memory import make, make_filter, merge
from polytask.merging.masked import MaskedExperts, pack
from polytask.merging.routed import forcing, recording
from polytask.merging.routed_model import load_routed, save_routed
from polytask.merging.statistics import gather_fisher, gather_gramians, gramian, input_mean, rows, second_moment

__all__ = [
    "Filter",
    "MaskedExperts",
    "MatrixMerger",
    "Merger",
    "Place",
    "TaskVectorMerger",
    "WeightMerger",
    "adapt",
    "forcing",
    "gather_fisher",
    "gather_gramians",
    "gramian",
    "input_mean",
    "load_routed",
    "make",
    "make_filter",
    "merge",
    "pack",
    "recording",
    "route",
    "rows",
    "save_routed",
    "second_moment",
]

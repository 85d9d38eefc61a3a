"""Several fine-tuned models -> one model: one file a method, tensor by tensor."""

from __future__ import annotations

from polytask.merging.base import Filter, MatrixMerger, Merger, Place, TaskVectorMerger, WeightMerger
from polytask.merging.in_memory import make, make_filter, merge
from polytask.merging.statistics import gather_fisher, gather_gramians, gramian, input_mean, rows, second_moment

__all__ = [
    "Filter",
    "MatrixMerger",
    "Merger",
    "Place",
    "TaskVectorMerger",
    "WeightMerger",
    "gather_fisher",
    "gather_gramians",
    "gramian",
    "input_mean",
    "make",
    "make_filter",
    "merge",
    "rows",
    "second_moment",
]

"""Several fine-tuned models -> one model: one file a method, tensor by tensor."""

from __future__ import annotations

from polytask.merging.adaptive import adapt
from polytask.merging.base import Filter, MatrixMerger, Merger, Place, TaskVectorMerger, WeightMerger
from polytask.merging.coefficients import fit_coefficients, fit_ensemble, search_coefficients, train_router
from polytask.merging.esm_pp import route_by_prototypes
from polytask.merging.fusion import ensemble, fusion_report, merge_experts, route_experts
from polytask.merging.in_memory import make, make_filter, merge
from polytask.merging.library import ExpertLibrary
from polytask.merging.masked import MaskedExperts, pack
from polytask.merging.routed import forcing, recording
from polytask.merging.routed_model import load_routed, save_routed
from polytask.merging.statistics import gather_fisher, gather_gramians, gramian, input_mean, rows, second_moment

__all__ = [
    "ExpertLibrary",
    "Filter",
    "MaskedExperts",
    "MatrixMerger",
    "Merger",
    "Place",
    "TaskVectorMerger",
    "WeightMerger",
    "adapt",
    "ensemble",
    "fit_coefficients",
    "fit_ensemble",
    "forcing",
    "fusion_report",
    "gather_fisher",
    "gather_gramians",
    "gramian",
    "input_mean",
    "load_routed",
    "make",
    "make_filter",
    "merge",
    "merge_experts",
    "pack",
    "recording",
    "route_by_prototypes",
    "route_experts",
    "rows",
    "save_routed",
    "search_coefficients",
    "second_moment",
    "train_router",
]

"""Several fine-tuned models -> one model: one file a method, tensor by tensor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.merging.adaptive import adapt
    from polytask.merging.base import Filter, MatrixMerger, Merger, Place, TaskVectorMerger, WeightMerger
    from polytask.merging.coefficients import fit_coefficients, fit_ensemble, search_coefficients, train_router
    from polytask.merging.esm_pp import route_by_prototypes
    from polytask.merging.fusion import ensemble, fusion_report, merge_experts, route_experts
    from polytask.merging.in_memory import make, make_filter, merge
    from polytask.merging.library import ExpertLibrary
    from polytask.merging.masked import MaskedExperts, pack
    from polytask.merging.moments import gramian, input_mean, rows, second_moment
    from polytask.merging.routed import forcing, recording
    from polytask.merging.routed_model import load_routed, save_routed
    from polytask.merging.smile import route_by_subspaces
    from polytask.merging.statistics import gather_fisher, gather_gramians

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
    "route_by_subspaces",
    "route_experts",
    "rows",
    "save_routed",
    "search_coefficients",
    "second_moment",
    "train_router",
]

_homes = {
    "ExpertLibrary": "library",
    "Filter": "base",
    "MaskedExperts": "masked",
    "MatrixMerger": "base",
    "Merger": "base",
    "Place": "base",
    "TaskVectorMerger": "base",
    "WeightMerger": "base",
    "adapt": "adaptive",
    "ensemble": "fusion",
    "fit_coefficients": "coefficients",
    "fit_ensemble": "coefficients",
    "forcing": "routed",
    "fusion_report": "fusion",
    "gather_fisher": "statistics",
    "gather_gramians": "statistics",
    "gramian": "moments",
    "input_mean": "moments",
    "load_routed": "routed_model",
    "make": "in_memory",
    "make_filter": "in_memory",
    "merge": "in_memory",
    "merge_experts": "fusion",
    "pack": "masked",
    "recording": "routed",
    "route_by_prototypes": "esm_pp",
    "route_by_subspaces": "smile",
    "route_experts": "fusion",
    "rows": "moments",
    "save_routed": "routed_model",
    "search_coefficients": "coefficients",
    "second_moment": "moments",
    "train_router": "coefficients",
}


def __getattr__(name: str) -> Any:
    # a plan, or one method, needs few of these files
    if name in _homes:
        return getattr(importlib.import_module(f"polytask.merging.{_homes[name]}"), name)
    raise AttributeError(f"module 'polytask.merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Ways of merging judged on real tasks: under one budget, beside the experts, the base and task arithmetic."""

from polytask.training.merges.candidates import Candidate, merged
from polytask.training.merges.compare import Standing, compare
from polytask.training.merges.config import Comparison, read_comparison
from polytask.training.merges.lineage import Lineage, MergeTask
from polytask.training.merges.systems import candidate, every_method

__all__ = [
    "Candidate",
    "Comparison",
    "Lineage",
    "MergeTask",
    "Standing",
    "candidate",
    "compare",
    "every_method",
    "merged",
    "read_comparison",
]

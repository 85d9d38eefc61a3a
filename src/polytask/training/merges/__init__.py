"""Ways of merging judged on real tasks: under one budget, beside the experts, the base and task arithmetic."""

from polytask.training.merges.candidates import Candidate, merged
from polytask.training.merges.compare import Standing, compare
from polytask.training.merges.config import Comparison, read_comparison
from polytask.training.merges.lineage import Lineage, MergeTask

__all__ = ["Candidate", "Comparison", "Lineage", "MergeTask", "Standing", "compare", "merged", "read_comparison"]

"""Small dense solvers for K x K problems, in float64 NumPy, with tolerances relative to the vectors' own lengths."""

from polytask.linalg.complementarity import nonnegative_qp
from polytask.linalg.conflict_averse import conflict_averse, worst_raised
from polytask.linalg.dual_cone import project_dual_cone
from polytask.linalg.fair import fair_weights
from polytask.linalg.linear_program import linear_program
from polytask.linalg.scaling import DOUBLE, SINGLE, correlation, definite, ridge
from polytask.linalg.simplex import min_norm_point, project_simplex, simplex_qp
from polytask.linalg.stationary import opposed

__all__ = [
    "DOUBLE",
    "SINGLE",
    "conflict_averse",
    "correlation",
    "definite",
    "fair_weights",
    "linear_program",
    "min_norm_point",
    "nonnegative_qp",
    "opposed",
    "project_dual_cone",
    "project_simplex",
    "ridge",
    "simplex_qp",
    "worst_raised",
]

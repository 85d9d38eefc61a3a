"""Small dense solvers for K x K problems, in float64 NumPy."""

from polytask.linalg.simplex import min_norm_point

__all__ = ["min_norm_point"]

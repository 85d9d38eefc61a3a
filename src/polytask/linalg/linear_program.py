"""Small linear programs."""

from __future__ import annotations

import numpy as np

from polytask.linalg.scaling import Matrix, Vector


def linear_program(c: Vector, A: Matrix, b: Vector, a: Vector) -> Vector | None:
    r"""Maximise :math:`c^\top y` subject to :math:`Ay \ge b`, :math:`a^\top y = 1`, :math:`y \ge 0`.

    Args:
        c: shape (n,).
        A: shape (rows, n), with entries of order 1: tolerances are absolute.
        b: shape (rows,); rows with :math:`-\infty` are no constraint.
        a: non-negative, shape (n,).

    Returns:
        A vertex that is optimal, shape (n,), or None where no point is feasible. Cost: 1 to 2 ms.
    """
    from scipy.optimize import linprog

    rows = np.isfinite(b)
    found = linprog(-c, A_ub=-A[rows], b_ub=-b[rows], A_eq=a[None], b_eq=[1.0], method="highs")
    return np.asarray(found.x, dtype=np.float64) if found.status == 0 else None

"""Small linear programs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix, Vector

ROUNDING = 1e-11
FEASIBLE = 1e-9


def linear_program(c: Vector, A: Matrix, b: Vector, a: Vector) -> Vector | None:
    r"""Maximise :math:`c^\top y` subject to :math:`Ay \ge b`, :math:`a^\top y = 1`, :math:`y \ge 0`.

    The simplex method on a tableau, which starts from the slacks where :math:`b \le 0`; where rounding spoils what it finds, HiGHS.

    Args:
        c: with entries of order 1, as all numbers here: tolerances are absolute. Shape (n,).
        A: shape (rows, n).
        b: shape (rows,); rows with :math:`-\infty` are no constraint.
        a: non-negative, shape (n,).

    Returns:
        A vertex that is optimal, shape (n,), or None where no point is feasible. Cost: usually fewer updates of a table of
        rows x (rows + n) numbers than there are unknowns.

    Source: Dantzig, Linear Programming and Extensions (1963); Bland, Mathematics of Operations Research 2 (1977), against cycling.
    """
    finite = np.isfinite(b)
    A, b = A[finite], b[finite]
    y = _simplex(c, A, b, a)
    if y is not None and (A @ y - b).min(initial=0.0) >= -FEASIBLE and abs(float(a @ y) - 1) <= FEASIBLE:
        return y
    from scipy.optimize import linprog

    found = linprog(-c, A_ub=-A, b_ub=-b, A_eq=a[None], b_eq=[1.0], method="highs")
    return np.asarray(found.x, dtype=np.float64) if found.status == 0 else None


def _simplex(c: Vector, A: Matrix, b: Vector, a: Vector) -> Vector | None:
    """Two phases on a table of [coefficients, slacks, right side]; None where it is infeasible, unbounded or does not end."""
    m, n = A.shape
    sign = np.where(b > 0, 1.0, -1.0)
    table = np.zeros((m + 1, n + m + 1))
    table[:m, :n], table[:m, n:-1], table[:m, -1] = sign[:, None] * A, np.diag(-sign), sign * b
    table[m, :n], table[m, -1] = a, 1.0
    artificial = n + m  # what stands for the rows that no slack makes feasible
    basis = np.append(np.where(b > 0, artificial, np.arange(n, n + m)), artificial)
    short = -table[basis == artificial].sum(0)
    if not _descend(table, basis, short) or short[-1] < -FEASIBLE:
        return None
    for row in np.flatnonzero(basis == artificial):  # at 0, by degeneracy
        column = int(np.abs(table[row, :-1]).argmax())
        if abs(table[row, column]) > ROUNDING:
            _pivot(table, basis, short, int(row), column)
    cost = np.append(-c, np.zeros(m + 1))
    inside = basis < artificial
    cost -= cost[basis[inside]] @ table[inside]
    if not _descend(table, basis, cost):
        return None
    y = np.zeros(n + m + 1)
    y[basis] = table[:, -1]
    return np.maximum(y[:n], 0.0)


def _descend(table: Matrix, basis: npt.NDArray[np.intp], cost: Vector) -> bool:
    """Pivot in place until no reduced cost is negative; False where that does not end."""
    columns = table.shape[1] - 1
    for step in range(20 * columns):
        negative = cost[:-1] < -ROUNDING
        if not negative.any():
            return True
        # the steepest column at first; the first one, which cannot cycle, where that takes long
        entering = int(cost[:-1].argmin()) if step < 4 * columns else int(negative.argmax())
        column = table[:, entering]
        rising = column > ROUNDING
        if not rising.any():
            return False
        ratios = np.full(len(column), np.inf)
        ratios[rising] = np.maximum(table[rising, -1], 0.0) / column[rising]
        ties = np.flatnonzero(ratios <= ratios.min() + ROUNDING)
        row = int(ties[basis[ties].argmin()]) if step >= 4 * columns else int(ties[column[ties].argmax()])
        _pivot(table, basis, cost, row, entering)
    return False


def _pivot(table: Matrix, basis: npt.NDArray[np.intp], cost: Vector, row: int, column: int) -> None:
    table[row] /= table[row, column]
    factors = table[:, column].copy()
    factors[row] = 0.0
    table -= factors[:, None] * table[row]
    cost -= cost[column] * table[row]
    basis[row] = column

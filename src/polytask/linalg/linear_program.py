"""Small linear programs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.linalg.scaling import Matrix, Vector

Places = npt.NDArray[np.intp]

ROUNDING = 1e-10  # relative to the point's, or the multipliers', largest number
PIVOT = 1e-9  # relative to the row's length, or the column's largest number
PRECISE = 1e-12  # while pivoting
LOOK = 16  # pivots between two looks at how large the numbers are
REBUILDS = 4
LAST = 2.0**-100


def linear_program(c: Vector, A: Matrix, b: Vector, a: Vector) -> Vector | None:
    r"""Maximise :math:`c^\top y` subject to :math:`Ay \ge b`, :math:`a^\top y = 1`, :math:`y \ge 0`.

    The dual simplex method with steepest edges, from the best vertex of :math:`a^\top y = 1` alone; primal pivots where that is not the
    best one. What a table tells is found anew from the constraints that hold with equality, which makes it the numbers' own accuracy
    however far those of a lie apart. Where that is no optimum after some tables, HiGHS.

    Args:
        c: shape (n,).
        A: with entries of order 1, shape (rows, n).
        b: shape (rows,); rows with :math:`-\infty` are no constraint.
        a: non-negative, not all 0, shape (n,).

    Returns:
        A vertex that is optimal, shape (n,), or None where no point is feasible. Cost: usually fewer updates of a table of
        rows x n numbers than there are unknowns.

    Source: Lemke, Naval Research Logistics Quarterly 1 (1954); Forrest and Goldfarb, Mathematical Programming 57 (1992).
    """
    finite = np.isfinite(b)
    A, b = (A, b) if finite.all() else (A[finite], b[finite])
    ratio = np.full(len(c), -np.inf)
    np.divide(c, a, out=ratio, where=a > 0)
    rows, columns = np.empty(0, dtype=np.intp), np.array([ratio.argmax()], dtype=np.intp)
    feasible = True
    for _ in range(REBUILDS):
        try:
            y = _vertex(c, A, b, a, rows, columns)
            if y is not None:
                return y
            table = _Table(c, A, b, a, rows, columns)
        except np.linalg.LinAlgError:
            break
        feasible = table.restore()
        if not feasible or not table.ascend():
            break
        rows, columns = table.tight()
    from scipy.optimize import linprog

    found = linprog(-c, A_ub=-A, b_ub=-b, A_eq=a[None], b_eq=[1.0], method="highs")
    return np.asarray(found.x, dtype=np.float64) if found.status == 0 else None


def _system(A: Matrix, a: Vector, rows: Places, columns: Places) -> Matrix:
    """The constraints that hold with equality, in the variables that are not 0; that of a is made small, to be eliminated last."""
    M = np.empty((len(columns), len(columns)))
    M[:-1], M[-1] = A[rows[:, None], columns], LAST * a[columns]
    return M


def _vertex(c: Vector, A: Matrix, b: Vector, a: Vector, rows: Places, columns: Places) -> Vector | None:
    """The point at which constraints hold with equality, where it is feasible and its multipliers show that none is better."""
    M = _system(A, a, rows, columns)
    y, right = np.zeros(len(c)), np.append(b[rows], LAST)
    y[columns] = inside = np.linalg.solve(M, right)
    slack = A @ y - b
    slack[rows] = 0.0
    if min(inside.min(), slack.min(initial=0.0)) < -ROUNDING * np.abs(inside).max():
        return None
    *multipliers, value = np.linalg.solve(M.T, c[columns])
    price = np.asarray(multipliers)
    gain = c - price @ A[rows] - LAST * value * a
    gain[columns] = 0.0
    size = max(float(np.abs(c).max()), float(np.abs(price).max(initial=0.0)))
    if price.max(initial=0.0) > ROUNDING * size or (gain > ROUNDING * (size + abs(LAST * value) * a)).any():
        return None
    y = np.maximum(y, 0.0)
    return np.asarray(y / (a @ y))


class _Table:
    """The variables inside a basis, those of ``columns`` and the slacks of all but ``rows``, by the ones outside it.

    A last row holds what a unit of each variable outside costs, a last column the values at the vertex. Units make each column's largest
    number 1.
    """

    def __init__(self, c: Vector, A: Matrix, b: Vector, a: Vector, rows: Places, columns: Places) -> None:
        self.m, self.n = A.shape
        others, loose = np.delete(np.arange(self.n), columns), np.delete(np.arange(self.m), rows)
        self.inside, self.outside = np.concatenate([columns, self.n + loose]), np.concatenate([others, self.n + rows])
        k, r = len(columns), len(others)
        right = np.zeros((k, self.n))
        right[:-1, :r], right[-1, :r] = A[rows[:, None], others], LAST * a[others]
        right[np.arange(k - 1), np.arange(r, self.n - 1)] = -1.0
        right[:-1, -1], right[-1, -1] = b[rows], LAST
        T = np.empty((self.m + 2, self.n))
        T[:k] = np.linalg.solve(_system(A, a, rows, columns), right)
        T[k:-1] = A[loose[:, None], columns] @ T[:k]
        T[k:-1, :r] -= A[loose[:, None], others]
        T[k:-1, -1] -= b[loose]
        T[-1] = c[columns] @ T[:k]
        T[-1, :r] -= c[others]
        largest = np.abs(T[:-1]).max(0)
        T /= np.where(largest > 0, largest, 1.0)
        self.numbers, self.change = T, np.empty_like(T)

    def tight(self) -> tuple[Places, Places]:
        """The rows that hold with equality and the variables that are not 0."""
        return np.sort(self.outside[self.outside >= self.n]) - self.n, np.sort(self.inside[self.inside < self.n])

    def restore(self) -> bool:
        """Pivot until no variable is negative; False where one stays so whatever the others are, or where that does not end."""
        T = self.numbers
        values, costs, body = T[:-1, -1], T[-1, :-1], T[:-1, :-1]
        depth, edges, least = np.empty_like(values), np.empty_like(values), 0.0
        for step in range(3 * (self.m + self.n)):
            if step % LOOK == 0:
                least = -PRECISE * float(np.abs(values).max())
            np.minimum(values, 0.0, out=depth)
            np.einsum("ij,ij->i", body, body, out=edges)
            edges += 1.0
            depth *= depth
            depth /= edges
            row = int(depth.argmax())
            if values[row] >= least:
                return True
            column = _first(costs, -body[row], PIVOT * float(edges[row]) ** 0.5)
            if column is None:
                return False
            self._pivot(row, column)
        return False

    def ascend(self) -> bool:
        """Pivot until no variable outside gains anything; False where a gain has no end, or where that does not end."""
        T = self.numbers
        values, costs = T[:-1, -1], T[-1, :-1]
        for _ in range(3 * (self.m + self.n)):
            column = int(costs.argmin())
            if costs[column] >= -PRECISE * float(np.abs(costs).max()):
                return True
            speed = T[:-1, column]
            row = _first(values, speed, PIVOT * float(np.abs(speed).max()))
            if row is None:
                return False
            self._pivot(row, column)
        return False

    def _pivot(self, row: int, column: int) -> None:
        T = self.numbers
        pivot = float(T[row, column])
        along, across = T[row] / pivot, T[:, column].copy()
        T -= np.multiply(across[:, None], along, out=self.change)
        across /= -pivot
        T[:, column] = across
        T[row] = along
        T[row, column] = 1 / pivot
        self.inside[row], self.outside[column] = self.outside[column], self.inside[row]


def _first(room: Vector, speed: Vector, slowest: float) -> int | None:
    """What uses up its room first at its speed; among those that do so together the fastest."""
    moving = (speed > slowest).nonzero()[0]
    if not len(moving):
        return None
    fast = speed[moving]
    time = np.maximum(room[moving], 0.0)
    time /= fast
    return int(moving[np.where(time <= time.min(), fast, 0.0).argmax()])

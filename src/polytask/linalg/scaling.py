"""Taking the scale out of a Gramian."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

# relative to the unit diagonal of a correlation matrix: far above float64 rounding, far below any conflict that matters
RIDGE = 1e-13


def correlation(C: Matrix) -> tuple[Matrix, Vector]:
    r"""The cosines between vectors, and their lengths, from their inner products.

    .. math:: R_{ij} = C_{ij} / (n_i n_j), \qquad n_i = \sqrt{C_{ii}}

    Args:
        C: inner products of non-zero vectors, shape (tasks, tasks).

    Returns:
        R, shape (tasks, tasks), entries in [-1, 1] and exactly 1 on the diagonal; n, shape (tasks,).
    """
    n = np.sqrt(np.diag(C))
    R = np.clip(C / n / n[:, None], -1.0, 1.0)
    np.fill_diagonal(R, 1.0)
    return R, n


def definite(R: Matrix) -> Matrix:
    """R made positive definite: a relative ridge, and negative eigenvalues (rounding of a lower precision) raised to
    it.

    Args:
        R: symmetric with unit diagonal, shape (tasks, tasks).

    Returns:
        Shape (tasks, tasks). Cost: one Cholesky factorisation; an eigendecomposition where that fails.
    """
    raised = R + RIDGE * len(R) * np.eye(len(R))
    try:
        np.linalg.cholesky(raised)
    except np.linalg.LinAlgError:
        values, V = np.linalg.eigh(R)
        raised = np.asarray((V * np.maximum(values, RIDGE * len(R))) @ V.T)
    return raised

"""Taking the scale out of a Gramian."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

DOUBLE = float(np.finfo(np.float64).eps)
SINGLE = float(np.finfo(np.float32).eps)


def ridge(tasks: int, precision: float) -> float:
    """What added to the unit diagonal outweighs the rounding of a correlation matrix: an upper estimate of its error's norm."""
    return max(1e-13 * tasks, 2 * precision * float(np.sqrt(tasks)))


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


def definite(R: Matrix, precision: float = DOUBLE) -> Matrix:
    """R made positive definite beyond doubt: a relative ridge, and negative eigenvalues raised to it.

    Args:
        R: symmetric with unit diagonal, shape (tasks, tasks).
        precision: relative rounding of R's entries, that of the type in which gradients were multiplied.

    Returns:
        Shape (tasks, tasks). Cost: one Cholesky factorisation; an eigendecomposition where that fails.
    """
    least = ridge(len(R), precision)
    raised = R + least * np.eye(len(R))
    try:
        np.linalg.cholesky(raised)
    except np.linalg.LinAlgError:
        values, V = np.linalg.eigh(R)
        raised = np.asarray((V * np.maximum(values, least)) @ V.T)
    return raised

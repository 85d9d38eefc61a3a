"""Mean rank: where a method stands among its rivals, averaged over metrics; needs no scale and no reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def ranks(values: npt.ArrayLike, higher_is_better: Sequence[bool] | npt.NDArray[np.bool_]) -> Floats:
    r"""The rank of every method on every metric: 1 is best, ties share their mean rank, an undefined value is last.

    .. math:: r_i = 1 + \#\{j : j \text{ better than } i\} + \tfrac12 \#\{j \ne i : j \text{ equals } i\}

    Args:
        values: shape (methods, metrics).
        higher_is_better: shape (metrics,).

    Returns:
        Shape (methods, metrics).
    """
    sign = np.where(np.asarray(higher_is_better, dtype=bool), 1.0, -1.0)
    merit = np.nan_to_num(np.asarray(values, dtype=np.float64) * sign, nan=-np.inf)
    better = (merit[None, :, :] > merit[:, None, :]).sum(1)
    equal = (merit[None, :, :] == merit[:, None, :]).sum(1) - 1
    return np.asarray(1.0 + better + equal / 2.0)


def mean_rank(values: npt.ArrayLike, higher_is_better: Sequence[bool] | npt.NDArray[np.bool_]) -> Floats:
    """The mean over metrics of each method's rank, 1 is best.

    Args:
        values: shape (methods, metrics).
        higher_is_better: shape (metrics,).

    Returns:
        Shape (methods,); the mean of all entries is (methods + 1) / 2.
    """
    return np.asarray(ranks(values, higher_is_better).mean(1))

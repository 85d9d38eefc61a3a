r"""Intervals for many comparisons at once: among forty methods that do not differ, two would seem to at 95 % each.

The intervals are :math:`\hat d_i \pm q\,s_i`, with :math:`s_i` the bootstrap standard error of difference i and q the 95 % quantile
of :math:`\max_i |d_i^* - \bar d_i| / s_i` over the bootstrap samples: all of them hold their difference at once with that
probability, and what the differences have in common (rows, seeds, the baseline) is taken into account.

Sources: Westfall and Young 1993, "Resampling-based multiple testing"; Romano and Wolf, Econometrica 2005.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.metrics.bootstrap import Interval

Floats = npt.NDArray[np.float64]


def simultaneous_intervals(differences: npt.ArrayLike, replicates: Floats, level: float = 0.95) -> list[Interval]:
    """An interval for each difference, such that all hold at once.

    Args:
        differences: on the data as they are, shape (n,).
        replicates: paired bootstrap samples of them, shape (samples, n); samples with an undefined number are left out.
        level: the probability with which all intervals hold.

    Returns:
        One interval each, symmetric around the difference; of width 0 where all samples agree.
    """
    d = np.asarray(differences, dtype=np.float64)
    kept = replicates[np.isfinite(replicates).all(1)]
    if not len(d) or not len(kept):
        return [Interval(float(x), float("nan"), float("nan")) for x in d]
    error = kept.std(0)
    away = np.abs(kept - kept.mean(0)) / np.where(error > 0, error, 1.0)
    reach = float(np.quantile(away.max(1), level)) * error
    return [Interval(float(x), float(x - r), float(x + r)) for x, r in zip(d, reach, strict=True)]

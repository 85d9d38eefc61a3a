"""Problems on the simplex."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def min_norm_point(C: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Placeholder."""
    return np.full(len(C), 1 / len(C))

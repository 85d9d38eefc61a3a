"""Normalised scores: 0 is chance, 1 is the reference, for metrics whose zero means nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError


def normalised_score(value: npt.ArrayLike, chance: float, reference: float) -> npt.NDArray[np.float64]:
    r"""Where a value lies between chance and a reference, whichever direction is better.

    .. math:: \frac{M - M_\text{chance}}{M_\text{reference} - M_\text{chance}}

    Args:
        value: any shape.
        chance: the value of guessing (a random policy, the mean of the training labels).
        reference: the value that counts as 1 (a single-task model, a human).

    Raises:
        InputError: chance and reference are the same, so that nothing can be told apart.

    Source: Mnih et al., Nature 2015 (human-normalised scores).
    """
    span = reference - chance
    if abs(span) <= 1e-12 * max(abs(reference), abs(chance)):
        raise InputError(f"a score cannot be normalised between chance {chance} and a reference of the same value")
    return np.asarray((np.asarray(value, dtype=np.float64) - chance) / span)

"""The ray of a preference: the points whose losses are in proportion to it."""

from __future__ import annotations

import numpy as np

from polytask.balancing.base import GramianWeighting, Vector
from polytask.errors import InputError

LEAST = float(np.finfo(np.float64).tiny) ** 0.5


def losses_for_ray(balancer: GramianWeighting, losses: Vector | None) -> Vector:
    """The losses, which the method cannot do without, raised to a positive number whose square is one too.

    Raises:
        InputError: no losses.
    """
    if losses is None:
        raise InputError(f"{balancer.method.name} steers the losses towards the ray of the preference: give losses=")
    return np.asarray(np.maximum(losses, LEAST))


def off_ray(losses: Vector, p: Vector) -> Vector:
    r"""The part of the losses across the ray, as a share of their length.

    .. math:: h = (I - uu^\top) L / \lVert L\rVert, \qquad u = p / \lVert p\rVert

    Returns:
        Shape (tasks,); its length is the sine of the angle between the losses and the ray.
    """
    u = p / np.linalg.norm(p)
    F = losses / np.linalg.norm(losses)
    return np.asarray(F - (F @ u) * u)

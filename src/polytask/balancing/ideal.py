"""The ideal point: the lowest losses thought possible, from which scalarizations measure distance."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import Balancer
from polytask.errors import InputError


def ideal_point(
    balancer: Balancer, ideal: float | Sequence[float], losses: Float[Tensor, " active"]
) -> Float[Tensor, " active"] | float:
    """The ideal losses of the active tasks, on the losses' device.

    Raises:
        InputError: another number of ideal losses than tasks.
    """
    if isinstance(ideal, int | float):
        return float(ideal)
    assert balancer.tasks is not None
    if len(ideal) != len(balancer.tasks):
        raise InputError(f"the ideal point has {len(ideal)} numbers for {len(balancer.tasks)} tasks")
    return losses.new_tensor([ideal[i] for i in balancer.active])

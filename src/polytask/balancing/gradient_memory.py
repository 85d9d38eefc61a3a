"""One vector a task in the coordinates of the parameters, kept between steps."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError


def recall(
    state: dict[str, Any], key: str, n_tasks: int, J: Float[Tensor, "active coordinates"]
) -> Float[Tensor, "tasks coordinates"]:
    """The remembered rows ``state[key]``, zeros at first, on the device of J.

    Raises:
        InputError: J has another number of coordinates than before: it was not taken at the same parameters.
    """
    rows: Tensor | None = state[key]
    if rows is None:
        rows = torch.zeros(n_tasks, J.shape[1], dtype=J.dtype, device=J.device)
    elif rows.shape[1] != J.shape[1]:
        raise InputError(
            f"this method remembers gradients of {rows.shape[1]} coordinates and was given {J.shape[1]}: "
            "take them at the same parameters every step, with level='exact'"
        )
    state[key] = rows = rows.to(J)
    return rows

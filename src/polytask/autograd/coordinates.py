"""Parameters as the coordinates of one vector: whatever their types, a gradient is a row of real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor


def coordinates(parameter: Tensor) -> int:
    """How many real numbers a parameter is: two for each complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def number_type(parameters: Sequence[Tensor]) -> torch.dtype:
    """The real type that holds the gradients of all of them."""
    kinds = {p.dtype.to_real() for p in parameters}
    return kinds.pop() if len(kinds) == 1 else reduce(torch.promote_types, kinds)


def flat(gradient: Tensor) -> Float[Tensor, " coordinates"]:
    """The coordinates of one gradient, dense; a view where it is."""
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.reshape(-1)


def shaped(piece: Float[Tensor, " coordinates"], parameter: Tensor) -> Tensor:
    """Coordinates as a gradient of the parameter, in its type and on its device."""
    piece = piece.to(parameter.device, parameter.dtype.to_real())
    if parameter.is_complex():
        return torch.view_as_complex(piece.reshape(*parameter.shape, 2).clone())  # a piece may begin at an odd number
    return piece.view_as(parameter)


def apart(vector: Float[Tensor, " coordinates"], parameters: Sequence[Tensor]) -> list[Tensor]:
    """A vector in the coordinates of all parameters as a gradient of each."""
    pieces = torch.split(vector, [coordinates(p) for p in parameters])
    return [shaped(piece, p) for piece, p in zip(pieces, parameters, strict=True)]

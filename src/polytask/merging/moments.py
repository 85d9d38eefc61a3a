r"""What the Gramian :math:`S = [X\; 1]^\top [X\; 1]` of a layer's inputs tells of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def gramian(S: Float[Tensor, "d+1 d+1"]) -> Float[Tensor, "d d"]:
    r""":math:`X^\top X` of the inputs."""
    return S[:-1, :-1]


def second_moment(S: Float[Tensor, "d+1 d+1"]) -> Float[Tensor, "d d"]:
    r""":math:`X^\top X / n` of the n inputs, not centred."""
    return S[:-1, :-1] / S[-1, -1]


def input_mean(S: Float[Tensor, "d+1 d+1"]) -> Float[Tensor, " d"]:
    """The mean of the inputs."""
    return S[:-1, -1] / S[-1, -1]


def rows(S: Float[Tensor, "d+1 d+1"]) -> int:
    """How many inputs (rows of X) there were."""
    return round(float(S[-1, -1]))

"""SLERP: spherical linear interpolation (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.errors import InputError
from polytask.merging.base import Merger, Place, in_range, pieces
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PARALLEL = 0.9995


@register(
    "slerp",
    family="merging",
    paper="doi:10.1145/325334.325242",
    needs="experts",
    invariances=("copies",),
    exempt={
        "permutation": "it leads from the first model to the second",
        "scale": "the angle between two models is not linear in their difference",
    },
)
class Slerp(Merger):
    r"""Go from one model to another along the arc between them, tensor by tensor.

    .. math:: W = \frac{\sin((1 - t)\,\theta)}{\sin\theta} W_a + \frac{\sin(t\,\theta)}{\sin\theta} W_b, \qquad
        \cos\theta = \frac{\langle W_a, W_b\rangle}{\lVert W_a\rVert \lVert W_b\rVert}

    From the base to the expert where there is one expert, from the first expert to the second where there are two. Nearly parallel or
    zero tensors are interpolated linearly.

    Args:
        t: 0 is the first model, 1 the second.

    Cost: a few passes over the two models.
    """

    needs = "experts"
    most = 2

    def __init__(self, *, t: float = 0.5) -> None:
        in_range(t, "t of slerp", 0, 1)
        self.t = t

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        if len(W) == 1 and W0 is None:
            raise InputError("slerp needs two models: a base and an expert, or two experts")
        a, b = (W0, W[0]) if len(W) == 1 and W0 is not None else (W[0], W[1])
        norms = float(a.norm()) * float(b.norm())
        # the inner product of a whole tensor loses too many digits in float32 to tell small angles
        cosine = inner(a, b) / norms if norms > 0 else 1.0
        if abs(cosine) > PARALLEL:
            return torch.lerp(a, b, self.t)
        theta = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
        first, second = (torch.sin(c * theta) / torch.sin(theta) for c in (1 - self.t, self.t))
        return a.mul_(float(first)).add_(b, alpha=float(second))


def inner(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    """The inner product of two tensors, summed in float64 piece by piece."""
    return sum(float(x.double() @ y.double()) for x, y in zip(pieces(a), pieces(b), strict=True))

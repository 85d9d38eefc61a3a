"""NearSwap: take over from another model what lies near (alchemonaut, 2024, with QuartetAnemoi-70B)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.errors import InputError
from polytask.merging.base import Merger, Place, in_range
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@register(
    "nearswap",
    family="merging",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    needs="experts",
    invariances=("copies",),
    exempt={
        "permutation": "it leads from the first model to the second",
        "scale": "how far an entry goes at most is an absolute number",
    },
)
class NearSwap(Merger):
    r"""Move every entry of one model towards that of another, by no more than a fixed step.

    .. math:: W = W_a + \min\Bigl(1, \frac{t}{|W_b - W_a|}\Bigr) (W_b - W_a)
        = W_a + \max(-t, \min(t, W_b - W_a))

    From the base to the expert where there is one expert, from the first expert to the second where there are two.

    Args:
        t: the step; entries that differ by less are the second model's.

    Cost: one pass over the two models.
    """

    needs = "experts"
    most = 2

    def __init__(self, *, t: float = 1e-4) -> None:
        in_range(t, "t of nearswap", 0, float("inf"))
        self.t = t

    def merge(self, W0: Tensor | None, W: Float[Tensor, "experts ..."], place: Place) -> Tensor:  # noqa: ARG002
        if len(W) == 1 and W0 is None:
            raise InputError("nearswap needs two models: a base and an expert, or two experts")
        a, b = (W0, W[0]) if len(W) == 1 and W0 is not None else (W[0], W[1])
        return b.sub_(a).clamp_(-self.t, self.t).add_(a)

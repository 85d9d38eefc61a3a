"""SAMO: sharpness-aware multi-task optimization with a joint global-local perturbation (Ban, Subramani and Ji, ICCV 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions
from polytask.balancing.looks import Looks
from polytask.balancing.sharpness import SharpnessAware
from polytask.errors import InputError
from polytask.registry import register


@register(
    "samo",
    family="balancing",
    paper="arXiv:2507.07883",
    needs="second evaluation",
    invariances=("permutation", "scale"),
)
class SAMO(SharpnessAware):
    r"""Go uphill by the mean gradient and a guess of each task's own, which costs no backward pass.

    .. math:: \hat g_i &= \frac{L_i(\theta + \epsilon z_i) - L_i(\theta - \epsilon z_i)}{2 \epsilon} z_i \\
        e_i^{(l)} &= \alpha\, \bar g^{(l)} + (1 - \alpha)\, \lVert \bar g^{(l)} \rVert\, \hat g_i^{(l)} / \lVert \hat g_i^{(l)} \rVert \\
        d &= A\Bigl(\nabla L_i\bigl(\theta + \rho\, e_i / \lVert e_i \rVert\bigr)\Bigr)

    with a standard normal :math:`z_i` for each task and step, in the shared coordinates, the mean gradient :math:`\bar g`, parameter
    tensors l, and the inner method A. The parameters of a task are moved by :math:`\rho` along their own gradient and get that of the loss
    there. Formulas and defaults are those of the authors' CelebA script, which takes the two guesses in evaluation mode; here they are
    taken in the mode the model is in.

    Args:
        inner: A, by name.
        inner_options: its options.
        rho: :math:`\rho`.
        alpha: :math:`\alpha`, share of the mean gradient in the way uphill.
        epsilon: :math:`\epsilon`, length of the probes for each coordinate.

    Cost: 1 + 3 K forward passes, 2 K of them without graph, and 1 + K backward passes; K x P numbers.
    """

    def __init__(
        self,
        *,
        inner: str = "cagrad",
        inner_options: Mapping[str, Any] | None = None,
        rho: float = 0.001,
        alpha: float = 0.9,
        epsilon: float = 0.01,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(inner, inner_options, rho, 1, **base)
        if not (0 <= alpha <= 1 and epsilon > 0):
            raise InputError(f"samo needs alpha in [0, 1] and epsilon > 0, not {alpha} and {epsilon}")
        self.alpha, self.epsilon = alpha, epsilon

    def guess(self, looks: Looks, name: str) -> Float[Tensor, " shared"]:
        """The gradient of one loss along a random direction."""
        first = looks.theta[0]
        generator = torch.Generator(first.device).manual_seed(int(self.rng.integers(2**62)))
        z = torch.randn(looks.n_shared, generator=generator, dtype=first.dtype, device=first.device)
        step = torch.cat([self.epsilon * z, z.new_zeros(sum(p.numel() for p in looks.theta) - len(z))])
        found = []
        for sign in (1.0, -1.0):
            with looks.moved(sign * step):
                found.append(looks.losses_without_graph(0)[name])
        return (found[0] - found[1]) / (2 * self.epsilon) * z

    def look(self, looks: Looks) -> tuple[Tensor, Tensor | None]:
        n, K = looks.n_shared, len(looks.names)
        mean = looks.slope(0, looks.values.new_full((K,), 1 / K))
        slopes = []
        for name in looks.names:
            e = looks.without_others(mean, name)
            layers = zip(
                *(torch.split(v, looks.shared_sizes) for v in (mean[:n], self.guess(looks, name))), strict=True
            )
            e[:n] = torch.cat(
                [self.alpha * g + (1 - self.alpha) * g.norm() * _unit(local) for g, local in layers] or [mean[:0]]
            )
            slopes.append(e)
        S = self.uphill(looks, torch.stack(slopes))
        return self.outcome(looks, self.combined(self.inners[0], S[:, :n], looks), S[:, n:].sum(0))


def _unit(v: Tensor) -> Tensor:
    size = v.norm()
    return v / torch.where(size > 0, size, 1.0)

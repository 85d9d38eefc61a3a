"""Random loss weighting (Lin, Ye, Zhang and Tsang, TMLR 2022, arXiv:2111.10603)."""

from __future__ import annotations

from typing import Literal, Unpack, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting, Vector
from polytask.errors import InputError
from polytask.registry import register

Distribution = Literal["normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli"]


@register(
    "rlw",
    family="balancing",
    paper="arXiv:2111.10603",
    needs="losses",
    aliases=("random", "random_loss_weighting"),
    invariances=("scale", "single"),
    exempt={"permutation": "the weights are drawn by position: equivariant in distribution only (test_random.py)"},
)
class RLW(LossWeighting):
    r"""Draw the weights anew at every step.

    .. math:: w = \frac{p \circ z}{\langle p, z\rangle}, \qquad z = e^u, \quad u \sim \mathcal{N}(0, I)

    or z from another distribution. The weights sum to 1 (not to K): halve or double the learning rate accordingly when comparing. Hard
    to beat for a method that looks at nothing, which is why it belongs in every comparison.

    Args:
        distribution: ``normal``; ``uniform``, where u is uniform between 0 and 1; ``dirichlet``, where w is uniform on the simplex;
            ``bernoulli``, where z is any set of tasks but the empty one, all alike; ``constrained_bernoulli``, where it is one task.

    Cost: K random numbers a step.
    """

    reads_values = False

    def __init__(self, *, distribution: Distribution = "normal", **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if distribution not in get_args(Distribution):
            known = ", ".join(map(repr, get_args(Distribution)))
            raise InputError(f"rlw draws from one of {known}, not {distribution!r}")
        self.distribution = distribution

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        z = self._draw(len(losses))
        w = torch.as_tensor(self.p * z / (self.p @ z)).to(losses)
        return (w * losses).sum(), w

    def _draw(self, k: int) -> Vector:
        match self.distribution:
            case "normal":
                return np.exp(self.rng.standard_normal(k))
            case "uniform":
                return np.exp(self.rng.random(k))
            case "dirichlet":
                return self.rng.standard_exponential(k)
            case "constrained_bernoulli":
                return np.asarray(np.eye(k)[self.rng.integers(k)])
        while True:
            chosen = self.rng.integers(2, size=k)
            if chosen.any():
                return chosen.astype(np.float64)

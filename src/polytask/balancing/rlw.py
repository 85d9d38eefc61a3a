"""Random loss weighting (Lin, Ye, Zhang and Tsang, TMLR 2022, arXiv:2111.10603)."""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.balancing.base import BaseOptions, LossWeighting
from polytask.errors import InputError
from polytask.registry import register


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

    .. math:: w = \mathrm{softmax}(z), \quad z \sim \mathcal{N}(0, I) \qquad \text{or} \qquad
        w \sim \mathrm{Dirichlet}(1)

    The weights sum to 1 (not to K): halve or double the learning rate accordingly when comparing. A preference
    multiplies the weights before they are made to sum to 1. Hard to beat for a method that looks at nothing, which is
    why it belongs in every comparison.

    Args:
        distribution: ``normal`` (softmax of normal numbers) or ``dirichlet`` (uniform on the simplex).

    Cost: K random numbers a step.
    """

    def __init__(self, *, distribution: Literal["normal", "dirichlet"] = "normal", **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if distribution not in ("normal", "dirichlet"):
            raise InputError(f"rlw draws from 'normal' or 'dirichlet', not {distribution!r}")
        self.distribution = distribution

    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Tensor, Tensor]:
        k = len(losses)
        z = np.exp(self.rng.standard_normal(k)) if self.distribution == "normal" else self.rng.standard_exponential(k)
        w = torch.as_tensor(self.p * z / (self.p @ z)).to(losses)
        return (w * losses).sum(), w

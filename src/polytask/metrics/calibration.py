"""Whether a classifier is as sure as it is right."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expected_calibration_error(
    probabilities: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"], bins: int = 15
) -> float:
    r"""The distance between confidence and accuracy (Guo et al., ICML 2017, arXiv:1706.04599).

    .. math:: \sum_b \frac{n_b}{N} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert

    over bins of equal width of the largest probability.

    Args:
        probabilities: of every class.
        labels: the true ones.
        bins: how many.

    Returns:
        Between 0, best, and 1.
    """
    confidence, predicted = probabilities.double().max(-1)
    correct = (predicted == labels).double()
    b = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=b.device).scatter_add_(0, b, correct - confidence)
    return float(gap.abs().sum()) / len(labels)

"""Choosing a few experts of many, one after another, from what each predicts alone."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polytask.errors import InputError


def greedy_coverage(losses: Float[Tensor, "experts tasks"], m: int) -> list[int]:
    r"""Take the expert that most lowers the loss of the best one chosen, averaged over tasks: for routing.

    .. math:: \min_{|S| = m}\ \frac1T \sum_t \min_{k \in S} L_{kt}

    Facility location: the gain is monotone and submodular, so that this is within 1 - 1/e of the best choice. Ties go to the first.

    Args:
        losses: L, such as the validation loss of every expert on every task.
        m: how many experts.

    Raises:
        InputError: more than there are, or none.
    """
    _check(m, len(losses))
    chosen: list[int] = []
    best = torch.full_like(losses[0], float("inf"))
    while len(chosen) < m:
        value = torch.minimum(losses, best).mean(1)
        value[chosen] = float("inf")
        chosen.append(int(value.argmin()))
        best = torch.minimum(best, losses[chosen[-1]])
    return chosen


def greedy_ensemble(
    probabilities: Float[Tensor, "experts examples classes"],
    labels: Int[Tensor, " examples"],
    m: int,
    *,
    replacement: bool = False,
) -> list[int]:
    r"""Take the expert with which the uniform ensemble of those chosen predicts best (Caruana et al., ICML 2004).

    .. math:: \min_S\ -\frac1N \sum_n \log \frac{1}{|S|} \sum_{k \in S} p_k(y_n \mid x_n)

    Args:
        probabilities: of every expert for every example, computed once.
        labels: y.
        m: how many experts.
        replacement: let an expert be taken more than once, which gives it an integer weight.

    Raises:
        InputError: more than there are, or none.
    """
    _check(m, m if replacement else len(probabilities))
    own = probabilities[:, torch.arange(len(labels)), labels].double()
    chosen: list[int] = []
    total = torch.zeros_like(own[0])
    while len(chosen) < m:
        loss = -((total + own) / (len(chosen) + 1)).clamp_min(torch.finfo(own.dtype).tiny).log().mean(1)
        if not replacement:
            loss[chosen] = float("inf")
        chosen.append(int(loss.argmin()))
        total = total + own[chosen[-1]]
    return chosen


def _check(m: int, most: int) -> None:
    if not 1 <= m <= most:
        raise InputError(f"of {most} experts 1 to {most} can be chosen, not {m}")

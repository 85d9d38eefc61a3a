"""FairGrad: fair resource allocation in multi-task learning (Ban and Ji, ICML 2024, arXiv:2402.15638)."""

from __future__ import annotations

from typing import Unpack

from polytask.balancing.base import BaseOptions, GramianWeighting, Matrix, Vector
from polytask.errors import InputError
from polytask.linalg import fair_weights
from polytask.registry import register


@register(
    "fairgrad",
    family="balancing",
    paper="arXiv:2402.15638",
    needs="gramian",
    invariances=("permutation", "scale", "non_conflict"),
)
class FairGrad(GramianWeighting):
    r"""Make the tasks' improvements alpha-fair.

    .. math:: C w = p \circ w^{-1/\alpha}, \quad w > 0

    :math:`\alpha \to 0` is the plain sum, :math:`\alpha = 1` proportional fairness (Nash-MTL), :math:`\alpha = 2`
    minimum potential delay, :math:`\alpha \to \infty` max-min fairness. At a Pareto-stationary point no solution
    exists; min-norm weights are used there and the log says so.

    Args:
        alpha: fairness, positive; the paper mostly uses 1 or 2.

    Cost: 5 to 12 Newton steps on K unknowns a step.
    """

    def __init__(self, *, alpha: float = 2.0, **base: Unpack[BaseOptions]) -> None:
        super().__init__(**base)
        if not alpha > 0:
            raise InputError(f"the fairness alpha of fairgrad is positive, not {alpha}")
        self.alpha = alpha
        self.degree = -alpha / (1 + alpha)

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        return fair_weights(C, self.p, self.alpha, self.precision)

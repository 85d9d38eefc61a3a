"""TALL masks: localizing task information in a sum of task vectors (Wang et al., ICML 2024, arXiv:2405.07813)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.base import PerExpert, in_range, per_expert
from polytask.merging.masking import Masking
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@register(
    "tall",
    family="merging",
    paper="arXiv:2405.07813",
    needs="base",
    aliases=("tall_mask", "TALLMask"),
    invariances=("scale",),
    exempt={
        "permutation": "the model of one expert, told by its position",
        "copies": "a sum of task vectors, not a mean",
        "integers_are_the_base_s": "what is not merged is the expert's own",
    },
    example={"expert": 0},
)
class TALL(Masking):
    r"""Add the task vectors up; each expert uses the entries in which the sum is nearer to its own task vector than to the base.

    .. math:: \tau = \sum_t \tau_t, \qquad m_t = \bigl[\,|\tau_t| \ge \ell_t\, |\tau - \tau_t|\,\bigr]

    An expert is unpacked as :math:`W_0 + m_t \odot \tau`. The merger ``consensus`` keeps what several of these masks agree in.

    Args:
        threshold: :math:`\ell_t`, one number or one an expert; the paper chooses among 0.2, 0.3, ..., 0.6 on validation data.
        expert: whose model is unpacked, by name or position; :func:`~polytask.merging.pack` keeps all of them.

    Cost: a few passes over the task vectors; one bit a parameter and expert.
    """

    rescaled = False

    def __init__(self, *, threshold: PerExpert = 0.4, expert: int | None = None) -> None:
        super().__init__(expert=expert)
        in_range(threshold, "the threshold of tall", 0, float("inf"), each=True)
        self.threshold = threshold

    def unify(self, D: Float[Tensor, "experts ..."]) -> tuple[Float[Tensor, "..."], Bool[Tensor, "experts ..."]]:
        limits = D.new_tensor(per_expert(self.threshold, len(D), "threshold")).view(-1, *[1] * (D.ndim - 1))
        tau = D.sum(0)
        return tau, (D.abs() >= limits * (tau - D).abs()) & (D != 0)

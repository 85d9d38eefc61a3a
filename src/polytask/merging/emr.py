"""EMR-Merging: elect, mask and rescale (Huang et al., NeurIPS 2024, arXiv:2405.17461)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytask.merging.masking import Masking
from polytask.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@register(
    "emr",
    family="merging",
    paper="arXiv:2405.17461",
    needs="base",
    aliases=("emr_merging",),
    invariances=("copies", "scale"),
    exempt={
        "permutation": "the model of one expert, told by its position",
        "integers_are_the_base_s": "what is not merged is the expert's own",
    },
    example={"expert": 0},
)
class EMR(Masking):
    r"""Keep the largest entries of the sign that experts elect; each expert uses those of its own sign, at its own size.

    .. math:: s = \operatorname{sign} \sum_t \tau_t, \qquad \tau = s \odot \max_t |\tau_t|\,[\tau_t s > 0], \qquad
        m_t = [\tau_t \odot \tau > 0], \qquad \lambda_t = \frac{\sum |\tau_t|}{\sum |m_t \odot \tau|}

    An expert is unpacked as :math:`W_0 + \lambda_t\, m_t \odot \tau`; the sums run over the whole model.

    Args:
        expert: whose model is unpacked, by name or position; :func:`~polytask.merging.pack` keeps all of them.

    Cost: a few passes over the task vectors; one bit a parameter and expert, one number an expert.
    """

    rescaled = True

    def unify(self, D: Float[Tensor, "experts ..."]) -> tuple[Float[Tensor, "..."], Bool[Tensor, "experts ..."]]:
        s = D.sum(0).sign()
        tau = s * (D * s).clamp_min(0).amax(0)
        return tau, D * tau > 0

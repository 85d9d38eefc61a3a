"""DB-MTL: dual-balancing multi-task learning (Lin et al., 2023, arXiv:2308.12029)."""

from __future__ import annotations

import numpy as np

from polytask.balancing.base import GramianWeighting, Matrix, Preference, Vector
from polytask.registry import register


@register(
    "db_mtl",
    family="balancing",
    paper="arXiv:2308.12029",
    needs="gramian",
    aliases=("dual_balancing",),
    invariances=("permutation", "scale", "task_scale"),
)
class DBMTL(GramianWeighting):
    r"""Take logarithms of the losses, then scale all gradients to the length of the longest.

    .. math:: g_i = \nabla \log L_i, \qquad w_i = p_i \max_j \lVert g_j\rVert / \lVert g_i\rVert

    The loss part is ``log_losses=True``, the default of this class. The paper further replaces each :math:`g_i` by a moving
    average over steps, which needs K x P numbers kept and has no meaning for gradients at the representation of ever new
    examples: that is ``db_mtl_ema``, this its beta = 0.

    Cost: K square roots a step.
    """

    def __init__(
        self, *, preference: Preference = None, log_losses: bool = True, every: int = 1, seed: int = 0
    ) -> None:
        super().__init__(preference=preference, log_losses=log_losses, every=every, seed=seed)

    def solve(self, C: Matrix, losses: Vector | None) -> Vector:  # noqa: ARG002
        n = np.sqrt(np.diag(C))
        return np.asarray(self.p * n.max() / n)

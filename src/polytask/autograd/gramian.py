"""The Gramian of per-task gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gramian(rows: Float[Tensor, "tasks coordinates"]) -> Float[Tensor, "tasks tasks"]:
    r"""Inner products :math:`C_{ij} = \langle g_i, g_j \rangle` of the rows, in float64.

    Each entry is one dot product in the rows' precision (float32 for half types), so its error is relative to
    :math:`\lVert g_i\rVert \lVert g_j\rVert` however different the rows' norms are. Rows whose squares leave the range of the
    type are divided by their largest entry first.

    Args:
        rows: per-task gradients, shape (tasks, coordinates), in loss units per parameter unit.

    Returns:
        Shape (tasks, tasks), float64, symmetric. Cost: one K x P x K product.
    """
    rows = rows.detach()
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    product = (rows @ rows.T).double()
    safe = torch.finfo(rows.dtype)
    diagonal = product.diagonal()
    if not bool(((diagonal > safe.tiny / safe.eps**2) & torch.isfinite(diagonal)).all()):
        largest = rows.abs().amax(1, keepdim=True)
        largest = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
        unit = rows / largest
        size = largest.double()
        product = (unit @ unit.T).double() * size * size.T
    return (product + product.T) / 2

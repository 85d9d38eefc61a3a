"""The Gramian of per-task gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# coordinates multiplied in the rows' own precision: few enough for exact sums, enough for a fast product
PIECE = 4096


def gramian(rows: Float[Tensor, "tasks coordinates"]) -> Float[Tensor, "tasks tasks"]:
    r"""Inner products :math:`C_{ij} = \langle g_i, g_j \rangle` of the rows, in float64.

    Each entry is a sum, in float64, of dot products of some thousand coordinates in the rows' precision (float32 for half types), so
    its error is relative to :math:`\lVert g_i\rVert \lVert g_j\rVert` however different the rows' norms are, and does not grow with
    their length. Rows whose squares leave the range of the type are divided by their largest entry first.

    Args:
        rows: per-task gradients, shape (tasks, coordinates), in loss units per parameter unit.

    Returns:
        Shape (tasks, tasks), float64, symmetric. Cost: one K x P x K product.
    """
    rows = rows.detach()
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    product = products(rows, rows)
    safe = torch.finfo(rows.dtype)
    diagonal = product.diagonal()
    if rows.shape[1] and not bool(((diagonal > safe.tiny / safe.eps**2) & torch.isfinite(diagonal)).all()):
        largest = rows.abs().amax(1, keepdim=True)
        largest = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
        unit = rows / largest
        size = largest.double()
        product = products(unit, unit) * size * size.T
    return (product + product.T) / 2


def products(
    left: Float[Tensor, "some coordinates"], right: Float[Tensor, "others coordinates"]
) -> Float[Tensor, "some others"]:
    """Inner products of the rows of two matrices: of pieces in the rows' own precision, added up in float64."""
    n = left.shape[1] // PIECE
    product = (left[:, n * PIECE :] @ right[:, n * PIECE :].T).double()
    if n:
        a, b = (rows[:, : n * PIECE].view(len(rows), n, PIECE).transpose(0, 1) for rows in (left, right))
        product += torch.bmm(a, b.transpose(1, 2)).sum(0, dtype=torch.float64)
    return product

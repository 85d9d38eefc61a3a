"""Gradients of several tasks at one place, held in the form in which they arrive.

A balancer asks four things of them: their Gramian, a combination of them, and (rarely) how much pulls at each coordinate either way, or the
rows themselves. Rows are one way to answer; for linear heads the gradient at the representation is a product of two small matrices, and the
first three answers need no row at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd.gramian import gramian
from polytask.autograd.workspace import Workspace

Pulls = tuple[Float[Tensor, " piece"], Float[Tensor, " piece"]]

# numbers held at a time while coordinates are looked at
PIECE = 2**16
TABLE = 2**18


class TaskGradients(ABC):
    """The gradients g_1 .. g_K of K tasks with respect to the same P coordinates."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the gradients."""

    @abstractmethod
    def gramian(self) -> Float[Tensor, "tasks tasks"]:
        """Inner products of the gradients, float64."""

    @abstractmethod
    def combination(self, w: Float[Tensor, " tasks"]) -> Float[Tensor, " coordinates"]:
        """sum_k w_k g_k, flat."""

    def pulls(self, p: Float[Tensor, " tasks"]) -> Iterator[Pulls]:
        r"""For consecutive pieces of the coordinates :math:`\sum_k p_k g_k` and :math:`\sum_k p_k |g_k|`.

        Args:
            p: non-negative.

        Yields:
            Two vectors in the gradients' type, of half types in single precision. Where all gradients have one sign they are equal but
            for it, to the last bit.
        """
        rows = self.rows()
        p = p.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
        for piece in torch.split(rows, max(1, TABLE // len(rows)), dim=1):
            wide = piece.to(p.dtype)
            yield p @ wide, p @ wide.abs()

    @abstractmethod
    def rows(self) -> Float[Tensor, "tasks coordinates"]:
        """The gradients as the rows of a matrix."""

    @abstractmethod
    def select(self, kept: list[int]) -> TaskGradients:
        """The gradients of some of the tasks."""

    def mine(self, direction: Float[Tensor, " everywhere"]) -> Float[Tensor, " coordinates"]:
        """What this process passes on of a direction in the coordinates of :meth:`rows`."""
        return direction


class DenseGradients(TaskGradients):
    """Gradients that are the rows of a matrix."""

    def __init__(self, rows: Float[Tensor, "tasks coordinates"]) -> None:
        self._rows = rows

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    def gramian(self) -> Float[Tensor, "tasks tasks"]:
        return gramian(self._rows)

    def combination(self, w: Float[Tensor, " tasks"]) -> Float[Tensor, " coordinates"]:
        return w.to(self._rows.dtype) @ self._rows

    def rows(self) -> Float[Tensor, "tasks coordinates"]:
        return self._rows

    def select(self, kept: list[int]) -> DenseGradients:
        return DenseGradients(self._rows[kept])


class LinearGradients(TaskGradients):
    r"""Gradients at the input of linear heads: :math:`g_k = D_k W_k` with D_k the gradient at the head's output.

    .. math:: \langle g_k, g_l\rangle = \sum_{c \in k, c' \in l} (D^\top D)_{cc'} (W W^\top)_{cc'}

    Args:
        D: gradients at the outputs of all heads side by side, shape (examples, outputs), outputs of a task next to one another.
        W: the heads' weights, shape (outputs, width).
        columns: the outputs of each task.
        workspace: where rows are written; new memory when omitted.

    Cost of the Gramian: (examples + width) outputs^2 instead of examples width tasks^2.
    """

    def __init__(
        self,
        D: Float[Tensor, "examples outputs"],
        W: Float[Tensor, "outputs width"],
        columns: Sequence[slice],
        workspace: Workspace | None = None,
    ) -> None:
        self._D, self._W, self._columns = D, W, tuple(columns)
        self._workspace = workspace or Workspace()

    @property
    def dtype(self) -> torch.dtype:
        return self._W.dtype

    def gramian(self) -> Float[Tensor, "tasks tasks"]:
        examples, outputs = self._D.shape
        width, tasks = self._W.shape[1], len(self._columns)
        if outputs**2 * (examples + width) > tasks**2 * examples * width:
            return gramian(self.rows())
        D, W = self._kept()
        # float64: where D is orthogonal to what the rows of W share (softmax heads), the products below cancel
        D, W = D.double(), W.double()
        E = (D.T @ D) * (W @ W.T)
        if len(W) > tasks:
            member = torch.nn.functional.one_hot(self._owner(), tasks).to(E)
            E = member.T @ E @ member
        return (E + E.T) / 2

    def combination(self, w: Float[Tensor, " tasks"]) -> Float[Tensor, " coordinates"]:
        D, W = self._kept()
        each = w.to(W)
        return ((D * (each if D.shape[1] == len(each) else each[self._owner()])) @ W).flatten()

    def pulls(self, p: Float[Tensor, " tasks"]) -> Iterator[Pulls]:
        wide = torch.promote_types(self._W.dtype, torch.float32)
        D, W, p = self._D.to(wide), self._W.to(wide), p.to(self._W.device, wide)
        pieces = max(1, PIECE // W.shape[1])
        if all(c.stop == c.start + 1 for c in self._columns):  # |d w'| = |d| |w|'
            D, W = self._kept()
            W, signless = W.to(wide), W.to(wide).abs()
            for d in torch.split(D * p, pieces):
                yield (d @ W).flatten(), (d.abs() @ signless).flatten()
            return
        values = p.tolist()
        for d in torch.split(D, pieces):
            total, size, one = (W.new_zeros(len(d), W.shape[1]) for _ in range(3))
            for value, c in zip(values, self._columns, strict=True):
                total.add_(torch.mm(d[:, c], W[c], out=one), alpha=value)
                size.add_(one.abs_(), alpha=value)
            yield total.flatten(), size.flatten()

    def _kept(self) -> tuple[Float[Tensor, "examples kept"], Float[Tensor, "kept width"]]:
        """D and W of these tasks' outputs, in their order."""
        if [c.start for c in self._columns] == [0, *(c.stop for c in self._columns[:-1])]:
            kept = self._columns[-1].stop
            return (self._D, self._W) if kept == len(self._W) else (self._D[:, :kept], self._W[:kept])
        places = torch.tensor([i for c in self._columns for i in range(c.start, c.stop)], device=self._D.device)
        return self._D[:, places], self._W[places]

    def _owner(self) -> Tensor:
        """Whose each of these outputs is."""
        return torch.tensor(
            [k for k, c in enumerate(self._columns) for _ in range(c.start, c.stop)], device=self._D.device
        )

    def rows(self) -> Float[Tensor, "tasks coordinates"]:
        examples, width = len(self._D), self._W.shape[1]
        rows = self._workspace.matrix(len(self._columns), examples * width, self._D)
        for row, c in zip(rows, self._columns, strict=True):
            torch.mm(self._D[:, c], self._W[c], out=row.view(examples, width))
        return rows

    def select(self, kept: list[int]) -> LinearGradients:
        return LinearGradients(self._D, self._W, [self._columns[k] for k in kept], self._workspace)

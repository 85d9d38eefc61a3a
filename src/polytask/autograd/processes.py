"""What several processes must tell one another so that all of them balance the gradients of the whole batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from polytask.autograd.gramian import gramian
from polytask.autograd.task_gradients import TaskGradients

Group = Any  # a torch.distributed.ProcessGroup: torch has no such name where it was built without distribution

_own_groups: dict[Any, Any] = {}
_world: Any = None


class Processes:
    """The processes that share a batch.

    Args:
        group: theirs, used by nothing else: reductions here may run while a distributed wrapper reduces its buckets, and two streams
            of collectives in one group would meet in different orders.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    @classmethod
    def of(cls, group: Group | Literal["world"] | None) -> Processes | None:
        """The processes of a group of the caller's, in a group of their own; None where there is but one.

        Args:
            group: ``world`` for all of them, where torch.distributed runs.
        """
        global _world
        if group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        if _world is not dist.group.WORLD:  # a new life of torch.distributed: its groups are new too
            _own_groups.clear()
            _world = dist.group.WORLD
        parent = dist.group.WORLD if isinstance(group, str) else group
        if dist.get_world_size(parent) == 1:
            return None
        if parent not in _own_groups:
            ranks = dist.get_process_group_ranks(parent)
            _own_groups[parent] = dist.new_group(ranks, use_local_synchronization=parent is not dist.group.WORLD)
        return cls(_own_groups[parent])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up over processes, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """What the first process has, in place."""
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def objects(self, mine: Any) -> list[Any]:
        """What each process has, of small objects."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def scatter_sum(self, rows: Float[Tensor, "tasks padded"]) -> Float[Tensor, "tasks slice"]:
        """Add up over processes, each keeping its share of the columns, whose number the processes divide."""
        pieces = rows.new_empty(len(rows), rows.shape[1] // self.size)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        for piece, row in zip(pieces, rows, strict=True):
            scatter(piece, row, group=self.group)
        return pieces

    def gather(self, piece: Float[Tensor, "*shape"]) -> Float[Tensor, "processes *shape"]:
        """The equally large pieces of all processes."""
        whole = piece.new_empty(self.size * piece.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, piece.flatten(), group=self.group)
        return whole.view(self.size, *piece.shape)

    def padded(self, n: int) -> int:
        """The least multiple of the number of processes that n columns fit in."""
        return -(-n // self.size) * self.size


class SlicedGradients(TaskGradients):
    """Gradients at parameters, averaged over processes, of which each process holds a slice of the coordinates.

    Args:
        rows: this process's gradients, shape (tasks, padded): ``coordinates`` columns and zeros up to ``processes.padded``.
        coordinates: how many columns count.

    Communication: one reduce-scatter of tasks x coordinates, one all-reduce of tasks x tasks; one all-gather of the coordinates for a
    combination, of tasks x coordinates for the rows.
    """

    def __init__(self, rows: Float[Tensor, "tasks padded"], coordinates: int, processes: Processes) -> None:
        self._slice = processes.scatter_sum(rows) / processes.size
        self._coordinates, self._processes = coordinates, processes

    @property
    def dtype(self) -> torch.dtype:
        return self._slice.dtype

    def gramian(self) -> Float[Tensor, "tasks tasks"]:
        return self._processes.sum_(gramian(self._slice))

    def combination(self, w: Float[Tensor, " tasks"]) -> Float[Tensor, " coordinates"]:
        return self._processes.gather(w.to(self._slice) @ self._slice).flatten()[: self._coordinates]

    def rows(self) -> Float[Tensor, "tasks coordinates"]:
        return self._processes.gather(self._slice).transpose(0, 1).flatten(1)[:, : self._coordinates]

    def select(self, kept: list[int]) -> SlicedGradients:
        chosen = object.__new__(SlicedGradients)
        chosen._slice, chosen._coordinates, chosen._processes = self._slice[kept], self._coordinates, self._processes
        return chosen


class DisjointGradients(TaskGradients):
    r"""Gradients at a representation, each process holding those of its own examples.

    The loss is the mean over R processes, so the gradient with respect to the representation of all examples is that of each process
    divided by R, side by side, and its Gramian is :math:`R^{-2} \sum_r C_r`: tasks x tasks numbers tell everything.

    Args:
        mine: of the losses whose mean over processes is differentiated.
    """

    def __init__(self, mine: TaskGradients, processes: Processes) -> None:
        self._mine, self._processes = mine, processes

    @property
    def dtype(self) -> torch.dtype:
        return self._mine.dtype

    def gramian(self) -> Float[Tensor, "tasks tasks"]:
        return self._processes.sum_(self._mine.gramian()) / self._processes.size**2

    def combination(self, w: Float[Tensor, " tasks"]) -> Float[Tensor, " coordinates"]:
        return self._mine.combination(w)

    def rows(self) -> Float[Tensor, "tasks coordinates"]:
        rows = self._mine.rows() / self._processes.size
        widths = self._processes.objects(rows.shape[1])
        padded = torch.nn.functional.pad(rows, (0, max(widths) - rows.shape[1]))
        whole = self._processes.gather(padded)
        self._begin = sum(widths[: self._processes.rank])
        self._end = self._begin + rows.shape[1]
        return torch.cat([piece[:, :width] for piece, width in zip(whole, widths, strict=True)], dim=1)

    def mine(self, direction: Float[Tensor, " everywhere"]) -> Float[Tensor, " coordinates"]:
        # the distributed wrapper divides by the number of processes once more
        return direction[self._begin : self._end] * self._processes.size

    def select(self, kept: list[int]) -> DisjointGradients:
        return DisjointGradients(self._mine.select(kept), self._processes)

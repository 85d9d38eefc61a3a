"""Generated traffic seen by two agents: what each of them sees, and what is there."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

SIZE, GRID = 32, 16  # cells of the world a side, of the model's output
AGENTS, PAST, FUTURE, MOST = 2, 4, 6, 8
RAYS, REACH = 160, 2 * 46  # rays an agent casts, half-cell steps along each


@dataclass(frozen=True)
class Scenes:
    """What two agents see, and what is there.

    Args:
        seen: occupancy and height, shape (scenes, agents, past frames, 2, 32, 32); hidden cells are empty.
        complete: cells that any agent sees in the last frame before any are dropped, shape (scenes, 32, 32).
        present: whether an object's centre lies in a cell of the output grid, shape (scenes, 16, 16).
        boxes: offsets of the centre, log sizes, cosine and sine there, shape (scenes, 6, 16, 16).
        futures: offsets to the next six centres there, in cells of the world, shape (scenes, 12, 16, 16).
    """

    seen: Tensor
    complete: Tensor
    present: Tensor
    boxes: Tensor
    futures: Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def rows(self, at: Tensor) -> Scenes:
        """Those at the given positions."""
        return Scenes(*(getattr(self, f.name)[at] for f in fields(self)))


@lru_cache(maxsize=2)  # the arms of one seed look at the same scenes
def draw(n: int, dropped: float, seed: int) -> Scenes:
    """Scenes of 4 to 8 rectangles that stand, drive straight on or turn.

    Args:
        n: how many.
        dropped: share of the occupied cells in view that are lost.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)
    exists = torch.arange(MOST) < torch.randint(4, MOST + 1, (n, 1), generator=g)
    length, width = 3 + 2 * torch.rand(n, MOST, generator=g), 1.5 + torch.rand(n, MOST, generator=g)
    height = 0.3 + 0.7 * torch.rand(n, MOST, generator=g)
    centres, headings = _paths(n, g)
    inside = _inside(centres[:, :, :PAST], headings[:, :, :PAST], length, width) & exists[:, :, None, None, None]
    heights = (inside * height[:, :, None, None, None]).amax(1)
    occupied = inside.any(1)
    eyes = 4 + (SIZE - 8) * torch.rand(n, AGENTS, 2, generator=g)
    visible = torch.stack([_visible(occupied, eyes[:, a]) for a in range(AGENTS)], 1) & occupied[:, None]
    kept = visible & (torch.rand(visible.shape, generator=g) >= dropped)
    seen = torch.stack([kept.float(), kept * heights[:, None]], 3)
    here = centres[:, :, PAST - 1]
    # what no agent ever sees is not asked for
    met = (inside & visible.any(1)[:, None]).flatten(2).any(2)
    within = met & ((here >= 0) & (here < SIZE)).all(-1)
    cell = (here * GRID / SIZE).long().clamp(0, GRID - 1)
    box = torch.cat(
        [
            here * GRID / SIZE - cell - 0.5,
            torch.stack([width.log(), length.log()], -1),
            torch.stack([headings[:, :, PAST - 1].cos(), headings[:, :, PAST - 1].sin()], -1),
        ],
        -1,
    )
    ahead = (centres[:, :, PAST:] - here[:, :, None]).flatten(2)
    present, boxes, futures = torch.zeros(n, GRID, GRID), torch.zeros(n, 6, GRID, GRID), torch.zeros(n, 12, GRID, GRID)
    scene, k = within.nonzero(as_tuple=True)
    x, y = cell[scene, k].unbind(1)
    present[scene, y, x], boxes[scene, :, y, x], futures[scene, :, y, x] = 1.0, box[scene, k], ahead[scene, k]
    return Scenes(seen, visible[:, :, -1].any(1).float(), present, boxes, futures)


def _paths(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres, shape (n, objects, frames, 2), and headings, shape (n, objects, frames); the present is frame 3."""
    kind = torch.randint(0, 3, (n, MOST), generator=g)  # stopped, straight, turning
    speed = (0.3 + 0.7 * torch.rand(n, MOST, generator=g)) * (kind > 0)
    turn = (torch.rand(n, MOST, generator=g) - 0.5) * 0.5 * (kind == 2)
    start = 2 * math.pi * torch.rand(n, MOST, generator=g)
    now = 4 + (SIZE - 8) * torch.rand(n, MOST, 2, generator=g)
    headings = start[..., None] + turn[..., None] * (torch.arange(PAST + FUTURE) - (PAST - 1))
    moves = speed[..., None, None] * torch.stack([headings.cos(), headings.sin()], -1)
    along = moves.cumsum(2)
    return now[:, :, None] + along - along[:, :, PAST - 1 : PAST], headings


def _inside(centres: Tensor, headings: Tensor, length: Tensor, width: Tensor) -> Tensor:
    """Which cells each rectangle covers, shape (n, objects, frames, 32, 32), rows being y."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    dx, dy = x - centres[..., 0, None, None], y - centres[..., 1, None, None]
    cos, sin = headings.cos()[..., None, None], headings.sin()[..., None, None]
    half = (length / 2)[..., None, None, None], (width / 2)[..., None, None, None]
    return ((cos * dx + sin * dy).abs() <= half[0]) & ((cos * dy - sin * dx).abs() <= half[1])


def _visible(occupied: Tensor, eye: Tensor) -> Tensor:
    """Cells in line of sight, shape (n, frames, 32, 32): along each ray up to the first object, and a cell's depth of it."""
    angle = 2 * math.pi * torch.arange(RAYS) / RAYS
    steps = torch.arange(REACH) / 2
    reach = torch.stack([angle.cos()[:, None] * steps, angle.sin()[:, None] * steps], -1)
    at = eye[:, None, None] + reach
    within = ((at >= 0) & (at < SIZE)).all(-1)
    cell = at.long().clamp(0, SIZE - 1)
    flat = (cell[..., 1] * SIZE + cell[..., 0]).flatten(1)
    result = []
    for frame in occupied.unbind(1):
        hit = frame.flatten(1).gather(1, flat).view(len(eye), RAYS, REACH)
        clear = (hit.cumsum(2) <= 2) & within
        counted = torch.zeros(len(eye), SIZE * SIZE).scatter_add_(1, flat, clear.flatten(1).float())
        result.append((counted > 0).view(-1, SIZE, SIZE))
    return torch.stack(result, 1)

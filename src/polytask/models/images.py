"""A small convolutional network for small grey images: a trunk of convolutions, a linear head for each task.

It stands in the place of the LeNet that Sener and Koltun 2018 (arXiv:1810.04650) share between the two tasks of MultiMNIST, with strides
where that one pools (Springenberg et al. 2015, arXiv:1412.6806): on a processor a step takes a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.models.base import HardSharing
from polytask.tasks import Tasks

KERNEL = 5


class ImageTrunk(nn.Module):
    """Grey images to a shared representation: ``{"image": (batch, height, width) uint8}`` -> (batch, width)."""

    def __init__(self, size: Sequence[int], channels: Sequence[int], width: int) -> None:
        super().__init__()
        before = (1, *channels[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, KERNEL, stride=2) for a, b in zip(before, channels, strict=True)
        )
        height, breadth = size
        for _ in channels:
            height, breadth = (height - KERNEL) // 2 + 1, (breadth - KERNEL) // 2 + 1
        if min(height, breadth) < 1:
            raise InputError(
                f"images of {size[0]} x {size[1]} are too small for {len(channels)} convolutions of {KERNEL}"
            )
        self.last = nn.Linear(channels[-1] * height * breadth, width)

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
        x = inputs["image"].to(self.last.weight.dtype).unsqueeze(1) / 255
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.last(x.flatten(1)))


class ImageModel(HardSharing):
    """A :class:`HardSharing` model of images that can be rebuilt: ``image_model(spec, tasks, **model.options)``.

    Attributes:
        options: the keyword arguments of :func:`image_model`, JSON-ready.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module], options: dict[str, Any]) -> None:
        super().__init__(trunk, heads)
        self.options = options


def image_model(
    spec: Mapping[str, Any], tasks: Tasks, *, channels: Sequence[int] = (8, 16), width: int = 50, seed: int = 0
) -> ImageModel:
    """Hard parameter sharing on grey images.

    Args:
        spec: ``image``, the height and width of the images, is read.
        tasks: what is learnt.
        channels: of the convolutions, each of 5 x 5 with a stride of 2.
        width: of the shared representation.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        InputError: an option out of its range, or images too small.
    """
    if not channels or min(channels) < 1 or width < 1:
        raise InputError(f"channels and width of an image model are at least 1, not {list(channels)} and {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = ImageTrunk(spec["image"], channels, width)
        heads = {name: nn.Linear(width, task.kind.output_size) for name, task in tasks.items()}
    return ImageModel(trunk, heads, {"channels": list(channels), "width": width, "seed": seed})

"""What is trained while steps are timed: a trunk of a common kind, a linear head a task, random numbers to learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.errors import InputError


class _MeanToken(nn.Module):
    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch width"]:
        return tokens.mean(1)


def _mlp() -> tuple[nn.Module, Tensor, int]:
    layers: list[nn.Module] = []
    for size in (64, 512, 512):
        layers += [nn.Linear(size, 512), nn.ReLU()]
    return nn.Sequential(*layers), torch.randn(256, 64), 512


def _conv() -> tuple[nn.Module, Tensor, int]:
    blocks: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(32, 3, 32, 32), 64


def _transformer() -> tuple[nn.Module, Tensor, int]:
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), _MeanToken()), torch.randn(32, 32, 128), 128


def _wide() -> tuple[nn.Module, Tensor, int]:
    layers = [m for _ in range(8) for m in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(32, 2048), 2048


TRUNKS: dict[str, Callable[[], tuple[nn.Module, Tensor, int]]] = {
    "mlp": _mlp,
    "conv": _conv,
    "transformer": _transformer,
    "wide": _wide,
}
"""Three common trunks, and one whose parameters outweigh its activations: the case in which a Jacobian hurts most."""


class Workload:
    """A model in pieces with one batch; equal arguments give equal numbers.

    Args:
        trunk: a name of :data:`TRUNKS`.
        n_tasks: how many heads.

    Attributes:
        trunk: the shared module.
        heads: one linear map to one number a task.
        inputs: of the trunk.
        targets: shape (batch, tasks).
        optimizer: SGD of all of them.
        width: of the representation.

    Raises:
        InputError: an unknown trunk, or no task.
    """

    def __init__(self, trunk: str, n_tasks: int) -> None:
        if trunk not in TRUNKS:
            raise InputError(f"there is no trunk {trunk!r}; there are {', '.join(TRUNKS)}")
        if n_tasks < 1:
            raise InputError(f"a step needs at least one task, not {n_tasks}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk, self.inputs, self.width = TRUNKS[trunk]()
            self.heads = nn.ModuleList(nn.Linear(self.width, 1) for _ in range(n_tasks))
            self.targets = torch.randn(len(self.inputs), n_tasks)
        self.optimizer = torch.optim.SGD([*self.trunk.parameters(), *self.heads.parameters()], lr=1e-4)

    def losses(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """One scalar a head's output, shape (batch, 1) each."""
        return [((y[:, 0] - self.targets[:, k]) ** 2).mean() for k, y in enumerate(outputs)]

"""Small real tables and models on which whole training runs take a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from polytask.models import HardSharing
from polytask.tasks import Binary, Multiclass, Regression, Task, Tasks
from polytask.training import TaskData


@dataclass(frozen=True)
class Problem:
    """A table cut in two, and the model for it."""

    tasks: Tasks
    train: TaskData
    validation: TaskData
    width: int

    def model(self, dropout: float = 0.0, seed: int = 0, names: tuple[str, ...] | None = None) -> HardSharing:
        """Always the same first weights for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            trunk = nn.Sequential(
                nn.Linear(self.width, 24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 16), nn.Tanh()
            )
            heads = {n: nn.Linear(16, self.tasks[n].kind.output_size) for n in names or self.tasks}
        return HardSharing(trunk, heads)


def _cut(inputs: torch.Tensor, targets: dict[str, torch.Tensor], tasks: Tasks) -> Problem:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    data = TaskData(inputs, targets).rows(order)
    cut = int(0.75 * len(data))
    return Problem(tasks, data.rows(slice(0, cut)), data.rows(slice(cut, None)), inputs.shape[1])


def _standard(table: object) -> torch.Tensor:
    x = torch.as_tensor(table, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


@pytest.fixture(scope="session")
def diabetes() -> Problem:
    """442 patients: disease progression (regression), sex (binary), blood pressure known for two thirds (regression)."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    x, y = torch.as_tensor(table.data, dtype=torch.float32), torch.as_tensor(table.target, dtype=torch.float32)
    pressure = x[:, 3].clone()
    pressure[::3] = float("nan")
    tasks = Tasks(
        [
            Task("progression", Regression(float(y.mean()), float(y.std()))),
            Task("sex", Binary()),
            Task("pressure", Regression(95.0, 14.0)),
        ]
    )
    inputs = _standard(x[:, [0, 2, 4, 5, 6, 7, 8, 9]])
    return _cut(inputs, {"progression": y, "sex": (x[:, 1] > 1.5).float(), "pressure": pressure}, tasks)


@pytest.fixture(scope="session")
def digits() -> Problem:
    """898 small images: which digit (10 classes), and is it odd, known for half of them."""
    from sklearn.datasets import load_digits

    table = load_digits()
    digit = torch.as_tensor(table.target[::2].copy())
    odd = (digit % 2).float()
    odd[::2] = float("nan")
    tasks = Tasks([Task("digit", Multiclass(10), classes=tuple(range(10))), Task("odd", Binary())])
    return _cut(_standard(table.data[::2]), {"digit": digit, "odd": odd}, tasks)


@pytest.fixture(scope="session")
def same() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two models hold the same weights, bit by bit."""

    def equal(a: nn.Module, b: nn.Module) -> bool:
        first, second = a.state_dict(), b.state_dict()
        return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)

    return equal

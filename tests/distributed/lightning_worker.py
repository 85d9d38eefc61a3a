"""A Lightning run that test_lightning.py starts: alone with all rows, or between processes that Lightning launches itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import polytask
from polytask.lightning import Balancing, MultiTaskModule
from polytask.models import HardSharing
from polytask.tasks import Regression

NAMES = ("a", "b", "c")
ROWS = (7, 3)
# task c has labels on the first process only
LABELLED = {"a": (7, 2), "b": (3, 3), "c": (6, 0)}
SCENES = {
    "famo": ("famo", "auto", "module"),
    "upgrad": ("upgrad", "representation", "module"),
    "moco": ("moco", "exact", "module"),
    "nash exact": ("nash_mtl", "exact", "module"),
    "somebody's": ("upgrad", "representation", "callback"),
}


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The rows of one process, or of both one after another, step by step."""

    def __init__(self, steps: int, rank: int | None) -> None:
        self.steps, self.rank = steps, rank

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for step in range(self.steps):
            inputs, targets = [], []
            for r in range(2) if self.rank is None else (self.rank,):
                g = torch.Generator().manual_seed(1000 * step + r)
                inputs.append(torch.randn(ROWS[r], 4, generator=g, dtype=torch.float64))
                y = torch.randn(ROWS[r], 3, generator=g, dtype=torch.float64)
                for i, n in enumerate(NAMES):
                    y[LABELLED[n][r] :, i] = torch.nan
                targets.append(y)
            y = torch.cat(targets)
            yield torch.cat(inputs), {n: y[:, i] for i, n in enumerate(NAMES)}


class Somebodys(pl.LightningModule):
    """A module that knows nothing of polytask but where to leave its losses; every row is labelled."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, _labels = batch
        outputs = self.model(x)
        self.task_losses = {n: (o[:, 0] - x[:, i]).square().mean() + 0.5 for i, (n, o) in enumerate(outputs.items())}
        return torch.stack(list(self.task_losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def network() -> HardSharing:
    torch.manual_seed(0)
    return HardSharing(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), {n: nn.Linear(5, 1) for n in NAMES})


def run(scene: str, steps: int, processes: int) -> dict[str, Tensor]:
    """The parameters after some steps."""
    name, level, how = SCENES[scene]
    module: pl.LightningModule
    callbacks: list[pl.Callback] = []
    if how == "module":
        module = MultiTaskModule(
            network(),
            polytask.Tasks([polytask.Task(n, Regression()) for n in NAMES]),
            balancer=name,
            level=level,  # type: ignore[arg-type]
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        )
    else:
        module = Somebodys()
        callbacks = [Balancing(name, features=lambda m: m.model.features)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto",
        precision="64-true",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    rank = trainer.global_rank if processes > 1 else None
    trainer.fit(module, DataLoader(Batches(steps, rank), batch_size=None))
    return {n: p.detach().clone() for n, p in module.named_parameters()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    found = {scene: run(scene, rows, processes=2) for scene in SCENES}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")

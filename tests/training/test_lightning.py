"""Lightning trains with the same gradients as the one-liner, in a module of ours and in a module of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from polytask.balancing import backward, make, step
from polytask.errors import InputError
from polytask.training.several_looks import cut

pytest.importorskip("lightning", reason="Lightning is an optional extra")

from lightning import pytorch as pl

from polytask.lightning import Balancing, MultiTaskModule


def loader(problem: Any, rows: int = 192) -> DataLoader:
    part = problem.train.rows(slice(0, rows))
    batches = [
        (part.inputs[i : i + 48], {n: t[i : i + 48] for n, t in part.targets.items()}) for i in range(0, rows, 48)
    ]
    return DataLoader(batches, batch_size=None)


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{"max_epochs": 2, **quiet, **options})


def by_hand(problem: Any, balancer: str, level: str, epochs: int = 2, clip: float | None = None) -> nn.Module:
    model, method = problem.model(), make(balancer)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        method.begin_epoch()
        for inputs, targets in loader(problem):
            sgd.zero_grad()
            losses = problem.tasks.losses(model(inputs), targets)
            backward(losses, shared=model.shared_parameters(), balancer=method, features=model.features, level=level)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            sgd.step()
            if method.needs_second_evaluation:
                with torch.no_grad():
                    method.after_step(problem.tasks.losses(model(inputs), targets))
    return model


class OwnModule(pl.LightningModule):
    """Somebody's module with automatic optimisation."""

    def __init__(self, problem: Any) -> None:
        super().__init__()
        self.problem, self.net = problem, problem.model()
        self.task_losses: dict[str, torch.Tensor] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        self.task_losses = self.problem.tasks.losses(self.net(inputs), targets)
        return sum(self.task_losses.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


def assert_close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("balancer", "level"), [("equal", "auto"), ("mgda", "auto"), ("upgrad", "exact"), ("famo", "auto")]
)
def test_the_module_takes_the_steps_of_the_one_liner(diabetes, tmp_path: Path, balancer: str, level: str) -> None:
    model = diabetes.model()
    module = MultiTaskModule(
        model,
        diabetes.tasks,
        balancer=balancer,
        level=level,
        clip_norm=0.2,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
    )
    trainer(tmp_path).fit(module, loader(diabetes))
    assert_close(model, by_hand(diabetes, balancer, level, clip=0.2))


@pytest.mark.parametrize(
    ("balancer", "level"), [("mgda", "representation"), ("upgrad", "exact"), ("uncertainty", "auto")]
)
def test_the_callback_balances_somebody_elses_module(diabetes, tmp_path: Path, balancer: str, level: str) -> None:
    module = OwnModule(diabetes)
    callback = Balancing(
        balancer, shared=lambda m: m.net.shared_parameters(), features=lambda m: m.net.features, level=level
    )
    trainer(tmp_path, callbacks=[callback]).fit(module, loader(diabetes))
    assert_close(module.net, by_hand(diabetes, balancer, level))
    assert callback.observation.tasks == tuple(diabetes.tasks)
    assert "backward" not in module.__dict__


def test_accumulation_and_clipping_stay_the_trainers_business(diabetes, tmp_path: Path) -> None:
    plain, balanced = OwnModule(diabetes), OwnModule(diabetes)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer(tmp_path, **options).fit(plain, loader(diabetes))
    trainer(tmp_path, callbacks=[Balancing("equal")], **options).fit(balanced, loader(diabetes))
    assert_close(plain.net, balanced.net)


def test_bfloat16_and_logs(diabetes, tmp_path: Path) -> None:
    module = MultiTaskModule(diabetes.model(), diabetes.tasks, balancer="mgda", learning_rate=3e-3)
    fit = trainer(tmp_path, precision="bf16-mixed")
    fit.fit(module, loader(diabetes), loader(diabetes, 96))
    for name in diabetes.tasks:
        assert torch.isfinite(fit.callback_metrics[f"validation/{name}/loss"])
    assert float(sum(fit.callback_metrics[f"train/{n}/weight"] for n in diabetes.tasks)) == pytest.approx(1, rel=1e-2)


def test_the_balancers_state_is_part_of_lightnings_checkpoint(diabetes, tmp_path: Path) -> None:
    def module() -> MultiTaskModule:
        return MultiTaskModule(diabetes.model(), diabetes.tasks, balancer="famo", learning_rate=3e-3)

    whole, first, second = module(), module(), module()
    trainer(tmp_path, max_epochs=4).fit(whole, loader(diabetes))
    half = trainer(tmp_path)
    half.fit(first, loader(diabetes))
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=4).fit(second, loader(diabetes), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_modules_that_do_not_fit_are_told(diabetes, tmp_path: Path) -> None:
    by_hand_module = MultiTaskModule(diabetes.model(), diabetes.tasks)
    with pytest.raises(InputError, match="optimises by hand"):
        trainer(tmp_path, callbacks=[Balancing("mgda")]).fit(by_hand_module, loader(diabetes))
    silent = OwnModule(diabetes)
    with pytest.raises(InputError, match=r"left no losses in self\.apart"):
        trainer(tmp_path, callbacks=[Balancing("mgda", losses="apart")]).fit(silent, loader(diabetes))


@pytest.mark.parametrize("name", ["modo", "auto_lambda", "samo"])
def test_methods_that_look_again_get_parts_of_every_batch(diabetes, tmp_path: Path, name: str) -> None:
    model, method = diabetes.model(), make(name)
    module = MultiTaskModule(
        model, diabetes.tasks, balancer=name, clip_norm=0.2, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
    )
    trainer(tmp_path, max_epochs=1).fit(module, loader(diabetes))
    written = diabetes.model()
    sgd = torch.optim.SGD(written.parameters(), lr=0.05)
    for batch in loader(diabetes):
        step(
            lambda part: diabetes.tasks.losses(written(part[0]), part[1]),
            cut(batch, len(method.roles)),
            optimizer=sgd,
            balancer=method,
            clip_norm=0.2,
            shared=written.trunk,
        )
    assert_close(model, written)


def test_automatic_optimisation_has_no_place_for_another_look() -> None:
    with pytest.raises(InputError, match=r"modo looks at the model more than once.*MultiTaskModule"):
        Balancing("modo")

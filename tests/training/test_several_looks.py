"""Methods that look at several batches, or at the model more than once, in the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from polytask.balancing import make
from polytask.balancing.looks import looks_again
from polytask.errors import InputError
from polytask.models import HardSharing
from polytask.registry import methods
from polytask.training import TaskData, TrainConfig, train
from polytask.training.several_looks import cut

CPU = TrainConfig(epochs=3, batch_size=48, device="cpu", checkpoint_every=2)
LOOKING = [m.name for m in methods("balancing") if looks_again(make(m.name, **m.example))]


def test_the_methods_that_look_again_are_those_registered_so() -> None:
    needing = {m.name for m in methods("balancing") if m.needs in ("several batches", "second evaluation")}
    assert set(LOOKING) == needing - {"famo"}


@pytest.mark.parametrize("name", LOOKING)
def test_a_run_learns_and_a_resumed_one_ends_bit_identical(diabetes, tmp_path, name: str) -> None:
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)

    def options() -> dict[str, object]:
        return {"balancer": make(name, seed=3), "config": CPU}

    whole = diabetes.model(dropout=0.2)
    history = train(whole, *arguments, **options()).history
    assert all(v[-1] < v[0] for v in history["validation_loss"].values() if v[0] > 1.0)
    assert all(math.isfinite(v) for task in history["train_loss"].values() for v in task)
    taken = []

    class Stop(Exception):
        pass

    def stopping(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        adam = torch.optim.AdamW(parameters, lr=CPU.learning_rate, weight_decay=CPU.weight_decay)

        def count(*_: object) -> None:
            taken.append(1)
            if len(taken) == 12:  # in the middle of the second epoch, two steps after a checkpoint
                raise Stop

        adam.register_step_post_hook(count)
        return adam

    with pytest.raises(Stop):
        train(diabetes.model(dropout=0.2), *arguments, **options(), folder=tmp_path, optimizer=stopping)
    again = diabetes.model(dropout=0.2, seed=5)
    resumed = train(again, *arguments, **options(), folder=tmp_path, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    assert resumed.history["score"] == history["score"]


@pytest.mark.parametrize("name", ["modo", "auto_lambda", "f_mtl"])
def test_a_task_absent_from_a_batch_keeps_its_head(diabetes, name: str) -> None:
    none = {n: t.clone() for n, t in diabetes.train.targets.items()}
    none["sex"][:] = -1 if none["sex"].dtype == torch.int64 else float("nan")
    batches = [
        (diabetes.train.inputs[i : i + 32], {n: t[i : i + 32] for n, t in none.items()}) for i in range(0, 160, 32)
    ]
    model, start = diabetes.model(), diabetes.model()
    result = train(model, diabetes.tasks, batches, balancer=name, config=CPU.but(epochs=1, weight_decay=0.0))
    assert result.history["train_loss"]["sex"] == [None]
    place = list(diabetes.tasks).index("sex")
    for k, (before, after) in enumerate(zip(start.heads, model.heads, strict=True)):
        assert torch.equal(before.weight, after.weight) == (k == place)


def test_a_batch_is_cut_in_parts_that_share_no_row() -> None:
    inputs = {"x": torch.arange(7), "pair": [torch.arange(14).view(7, 2), "kept"]}
    parts = cut((inputs, {"y": torch.arange(7) * 10}), 3)
    assert [part[0]["x"].tolist() for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [part[1]["y"].tolist() for part in parts] == [[0, 30, 60], [10, 40], [20, 50]]
    assert parts[1][0]["pair"][0].tolist() == [[2, 3], [8, 9]]
    assert parts[1][0]["pair"][1] == "kept"
    assert cut((inputs, {"y": torch.arange(5)}), 3) == []  # a part of one row has no spread
    whole = (inputs, {"y": torch.arange(7)})
    assert cut(whole, 1) == [whole]
    with pytest.raises(InputError, match=r"7 rows cannot be cut in 3.*\(2, 9\)"):
        cut((torch.zeros(2, 9), {"y": torch.arange(7)}), 3)


def test_a_last_batch_too_small_to_cut_is_passed_over(diabetes) -> None:
    data = diabetes.train.rows(slice(0, 36 + 4))
    result = train(diabetes.model(), diabetes.tasks, data, balancer="modo", config=CPU.but(epochs=1, batch_size=36))
    assert result.steps == 2
    assert all(math.isfinite(v[0]) for v in result.history["train_loss"].values())


def test_what_cannot_work_is_refused_before_the_first_step(diabetes) -> None:
    model = diabetes.model()
    before = [p.clone() for p in model.parameters()]
    for setting, message in (
        ({"accumulate": 2}, "larger batch_size, not accumulate"),
        ({"level": "representation"}, "at the parameters"),
        ({"batch_size": 5}, "batch_size must be at least 6"),
    ):
        with pytest.raises(InputError, match=message):
            train(model, diabetes.tasks, diabetes.train, balancer="modo", config=CPU.but(**setting))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_batch_statistics_move_once_a_part(diabetes) -> None:
    """The averages after a step are those of one look at each training part, whatever else the method looked at."""
    batch = 48
    data = TaskData(diabetes.train.inputs[:batch], {n: t[:batch] for n, t in diabetes.train.targets.items()})

    def model() -> HardSharing:
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(diabetes.width, 12), nn.BatchNorm1d(12), nn.Tanh())
        return HardSharing(trunk, {n: nn.Linear(12, t.kind.output_size) for n, t in diabetes.tasks.items()})

    for name, train_parts in (("auto_lambda", 1), ("modo", 3), ("samo", 1)):
        trained, expected = model(), model()
        train(trained, diabetes.tasks, [(data.inputs, data.targets)], balancer=name, config=CPU.but(epochs=1))
        for part in cut((data.inputs, data.targets), len(make(name).roles))[:train_parts]:
            expected.trunk(part[0])
        for b, c in zip(trained.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(b, c)

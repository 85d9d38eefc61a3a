"""The loop learns, repeats itself, stops where it should and tells the truth about it."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polytask.balancing import make
from polytask.balancing.base import LossWeighting
from polytask.errors import InputError, TrainingError
from polytask.models import HardSharing, wrap
from polytask.tasks import Binary, Regression, Task, Tasks
from polytask.training import Interrupted, Progress, TaskData, TrainConfig, predict_outputs, train
from polytask.training.data import Batches, epoch_order
from polytask.training.evaluation import constant_loss, explained_share

CPU = TrainConfig(epochs=4, batch_size=64, learning_rate=3e-3, device="cpu")


def loader_of(data: TaskData, **options: object) -> DataLoader:
    names = list(data.targets)

    def collate(rows: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x, *y = (torch.stack(column) for column in zip(*rows, strict=True))
        return x, dict(zip(names, y, strict=True))

    return DataLoader(TensorDataset(data.inputs, *data.targets.values()), collate_fn=collate, **options)


def test_a_small_real_table_is_learnt(digits) -> None:
    model = digits.model()
    result = train(model, digits.tasks, digits.train, digits.validation, config=CPU.but(epochs=12))
    digit = result.history["validation"]["digit"]["accuracy"][result.best_epoch - 1]
    odd = result.history["validation"]["odd"]["roc_auc"][result.best_epoch - 1]
    assert digit > 0.85
    assert odd > 0.9
    assert result.history["train_loss"]["digit"][-1] < 0.5 * result.history["train_loss"]["digit"][0]


def test_history_has_one_json_ready_entry_an_epoch(diabetes) -> None:
    result = train(diabetes.model(), diabetes.tasks, diabetes.train, diabetes.validation, balancer="mgda", config=CPU)
    history = json.loads(json.dumps(result.history, allow_nan=False))
    assert history["epoch"] == [1, 2, 3, 4]
    for key in ("train_loss", "validation_loss", "explained_share", "weights", "gradient_norm"):
        assert set(history[key]) == set(diabetes.tasks)
        assert all(len(values) == 4 and None not in values for values in history[key].values())
    assert {n: set(m) for n, m in history["validation"].items()} == {
        n: {metric.name for metric in t.metrics} for n, t in diabetes.tasks.items()
    }
    assert history["level"] == "representation"
    assert all(sum(w) == pytest.approx(1, rel=1e-5) for w in zip(*history["weights"].values(), strict=True))
    assert result.steps == 4 * math.ceil(len(diabetes.train) / 64)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(diabetes, same) -> None:
    def trained(seed: int) -> nn.Module:
        model = diabetes.model(dropout=0.3)
        train(model, diabetes.tasks, diabetes.train, diabetes.validation, balancer="rlw", config=CPU.but(seed=seed))
        return model

    first, again, other = trained(1), trained(1), trained(2)
    assert same(first, again)
    assert not same(first, other)


def test_the_callers_generators_are_left_alone(diabetes) -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global generator is what is under test
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    train(diabetes.model(dropout=0.2), diabetes.tasks, diabetes.train, config=CPU.but(epochs=1))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_loader_and_rows_in_memory_learn_the_same(diabetes) -> None:
    order = epoch_order(len(diabetes.train), CPU.seed, 0)
    by_rows, by_loader = diabetes.model(), diabetes.model()
    config = CPU.but(epochs=1)
    first = train(by_rows, diabetes.tasks, diabetes.train, diabetes.validation, config=config)
    loader = loader_of(diabetes.train.rows(order), batch_size=64)
    second = train(by_loader, diabetes.tasks, loader, loader_of(diabetes.validation, batch_size=50), config=config)
    for p, q in zip(by_rows.parameters(), by_loader.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert first.best_score == pytest.approx(second.best_score, rel=1e-5)


# ---- one step ----


@pytest.mark.parametrize(
    "balancer", ["equal", "mgda", "uncertainty", "geometric_mean", "famo", "nash_mtl", "graddrop", "pcgrad"]
)
@pytest.mark.parametrize("log_losses", [False, True])
def test_exact_accumulation_is_one_big_batch(diabetes, balancer: str, log_losses: bool) -> None:
    # the rows of one step in four micro-batches of unequal numbers of labels against one batch
    data = diabetes.train.rows(slice(0, 96))

    def stepped(**options: object) -> nn.Module:
        model = diabetes.model()
        config = TrainConfig(epochs=1, device="cpu", level="exact", clip_norm=0.1, **options)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        method = make(balancer, log_losses=log_losses, seed=3)
        result = train(model, diabetes.tasks, data, balancer=method, config=config, optimizer=sgd)
        assert result.steps == 1
        return model

    first = diabetes.model()
    whole, pieces = stepped(batch_size=96), stepped(batch_size=24, accumulate=4)
    for start, p, q in zip(first.parameters(), whole.parameters(), pieces.parameters(), strict=True):
        assert not torch.equal(start, p)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_cheap_accumulation_is_exact_for_equal_weights_with_missing_labels(diabetes) -> None:
    data = diabetes.train.rows(slice(0, 100))  # the last micro-batch is smaller

    def stepped(**options: object) -> nn.Module:
        model = diabetes.model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, diabetes.tasks, data, config=TrainConfig(epochs=1, device="cpu", **options), optimizer=sgd)
        return model

    for p, q in zip(
        stepped(batch_size=100).parameters(), stepped(batch_size=30, accumulate=4).parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["exact", "representation"])
def test_clipping_bounds_the_update_after_balancing(diabetes, level: str) -> None:
    def moved(clip: float | None) -> float:
        model, start = diabetes.model(), diabetes.model()
        config = CPU.but(epochs=1, batch_size=1000, clip_norm=clip, level=level)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        train(model, diabetes.tasks, diabetes.train, balancer="upgrad", config=config, optimizer=sgd)
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return math.sqrt(sum(float(((p - q) ** 2).sum().detach()) for p, q in pairs))

    free = moved(None)
    assert free > 0.02
    assert moved(free / 4) == pytest.approx(free / 4, rel=1e-3)
    assert moved(free * 4) == pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("balancer", ["equal", "mgda", "famo", "graddrop"])
@pytest.mark.parametrize("level", ["auto", "exact"])
def test_tasks_absent_from_batches_keep_their_heads(diabetes, balancer: str, level: str) -> None:
    # sex is labelled in 8 rows only: most batches of 16 lack it
    rare = diabetes.train.targets["sex"].clone()
    rare[8:] = float("nan")
    data = TaskData(diabetes.train.inputs, {**diabetes.train.targets, "sex": rare})
    model, start = diabetes.model(), diabetes.model()
    config = CPU.but(epochs=2, batch_size=16, level=level, weight_decay=0.0)
    result = train(model, diabetes.tasks, data, diabetes.validation, balancer=balancer, config=config)
    assert not torch.equal(model.heads[1].weight, start.heads[1].weight)
    assert all(math.isfinite(v) for v in result.history["train_loss"]["sex"])
    # an epoch without any label of the task leaves its head alone
    none = TaskData(diabetes.train.inputs[8:], {n: t[8:] for n, t in data.targets.items()})
    batches = [
        (none.inputs[i : i + 16], {n: t[i : i + 16] for n, t in none.targets.items()}) for i in range(0, 160, 16)
    ]
    model = diabetes.model()
    result = train(model, diabetes.tasks, batches, balancer=balancer, config=config)
    assert torch.equal(model.heads[1].weight, start.heads[1].weight)
    assert result.history["train_loss"]["sex"] == [None, None]
    assert not torch.equal(model.heads[0].weight, start.heads[0].weight)


def test_a_batch_without_any_label_is_passed_over(diabetes) -> None:
    x, nothing = torch.randn(8, 8), torch.full((8,), float("nan"))
    first = (diabetes.train.inputs[:32], {n: t[:32] for n, t in diabetes.train.targets.items()})
    batches = [(x, dict.fromkeys(diabetes.tasks, nothing)), first]
    result = train(diabetes.model(), diabetes.tasks, batches, config=CPU.but(epochs=1))
    assert result.steps == 2
    assert None not in [v[0] for v in result.history["train_loss"].values()]


def test_the_second_look_sees_the_same_rows_and_dropout_masks(diabetes) -> None:
    looks: list[tuple[dict[str, float], dict[str, float]]] = []
    balancer = make("famo")
    before: dict[str, float] = {}
    combine, after = balancer.combine, balancer.after_step

    def watched_combine(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before.update(zip(diabetes.tasks, losses.tolist(), strict=True))
        return combine(losses)

    def watched_after(losses: dict[str, torch.Tensor]) -> None:
        looks.append((dict(before), {n: float(v) for n, v in losses.items()}))
        after(losses)

    balancer.combine, balancer.after_step = watched_combine, watched_after
    frozen = CPU.but(epochs=1, learning_rate=1e-12, weight_decay=0.0)
    train(diabetes.model(dropout=0.5), diabetes.tasks, diabetes.train, balancer=balancer, config=frozen)
    assert len(looks) == math.ceil(len(diabetes.train) / 64)
    for then, now in looks:  # nothing moved, so the same masks give the same losses
        assert now == pytest.approx(then, rel=1e-5)


def test_bfloat16_learns_and_hands_the_model_back_as_it_was(digits) -> None:
    model = digits.model()
    result = train(
        model, digits.tasks, digits.train, digits.validation, balancer="mgda", config=CPU.but(precision="bf16")
    )
    assert result.history["train_loss"]["digit"][-1] < result.history["train_loss"]["digit"][0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    hidden = model.trunk(digits.train.inputs[:4])
    assert hidden.dtype == torch.float32
    assert model(digits.train.inputs[:4])["digit"].dtype == torch.float32
    # another precision in the same process
    train(digits.model(), digits.tasks, digits.train, config=CPU.but(epochs=1, precision="no"))


def test_the_schedule_reaches_the_optimizer() -> None:
    config = TrainConfig(schedule="cosine", warmup=0.25, epochs=1)
    factors = [config.rate_factor(s, 8) for s in range(8)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == 1.0
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert config.rate_factor(8, 8) == pytest.approx(0, abs=1e-12)
    assert TrainConfig(warmup=0.0).rate_factor(5, None) == 1.0

    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            seen.append(self.param_groups[0]["lr"])
            super().step(closure)

    model = HardSharing(nn.Linear(2, 2), {"a": nn.Linear(2, 1)})
    data = TaskData(torch.randn(32, 2), {"a": torch.randn(32)})
    config = CPU.but(schedule="cosine", warmup=0.25, epochs=2, batch_size=8)
    train(model, Tasks([Task("a", Regression())]), data, config=config, optimizer=lambda p: Watched(p, lr=0.5))
    assert seen == [pytest.approx(0.5 * f) for f in factors]


# ---- choosing an epoch ----


class Forced(LossWeighting):
    """Equal weights until an epoch from which on the losses are driven up."""

    method = make("equal").method

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn, self.epochs = turn, 0

    def begin_epoch(self) -> None:
        self.epochs += 1

    def combine(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sign = -1.0 if self.epochs > self.turn else 1.0
        return sign * losses.sum(), losses.detach().new_full((len(losses),), sign)


@pytest.mark.parametrize("stop_on", ["delta_m", "digit"])
def test_the_best_epoch_is_kept_and_patience_ends_the_run(digits, stop_on: str) -> None:
    model = digits.model()
    config = CPU.but(epochs=30, patience=3, stop_on=stop_on, learning_rate=1e-2)
    result = train(model, digits.tasks, digits.train, digits.validation, balancer=Forced(4), config=config)
    scores = result.history["score"]
    assert result.stopped == "patience"
    assert result.best_epoch == 1 + int(np.argmax(scores)) <= 5
    assert len(scores) == result.best_epoch + 3
    assert result.best_score == max(scores)
    predicted = predict_outputs(model, digits.tasks, digits.validation.inputs)["digit"]["prediction"]
    accuracy = float((predicted == digits.validation.targets["digit"].numpy()).mean())
    assert accuracy == pytest.approx(result.history["validation"]["digit"]["accuracy"][result.best_epoch - 1])


def test_without_a_score_the_last_epoch_is_kept(digits) -> None:
    config = CPU.but(epochs=6, stop_on=None, learning_rate=1e-2)
    model = digits.model()
    result = train(model, digits.tasks, digits.train, digits.validation, balancer=Forced(2), config=config)
    assert (result.stopped, result.best_epoch) == ("epochs", 6)
    assert result.best_score == result.history["score"][-1] < max(result.history["score"])


def test_a_metric_where_lower_is_better_is_turned_round(diabetes) -> None:
    config = CPU.but(stop_on="progression")
    result = train(diabetes.model(), diabetes.tasks, diabetes.train, diabetes.validation, config=config)
    assert result.history["score"] == [-v for v in result.history["validation"]["progression"]["rmse"]]


def test_explained_share_is_r2_and_mcfadden(diabetes, digits) -> None:
    y = diabetes.validation.targets["progression"]
    zero = torch.zeros(len(y), 1)
    regression = diabetes.tasks["progression"]
    best = constant_loss(regression, zero, y)
    assert best == pytest.approx(float(y.double().var(correction=0)) / regression.kind.scale**2, rel=1e-6)
    labels = digits.validation.targets["digit"]
    share = torch.bincount(labels, minlength=10).double() / len(labels)
    entropy = -float((share * share.log()).sum())
    assert constant_loss(digits.tasks["digit"], torch.zeros(len(labels), 10), labels) == pytest.approx(
        entropy, rel=1e-5
    )
    assert explained_share({"a": 0.25, "b": None}, {"a": 1.0, "b": 1.0}) == {"a": 0.75}
    # labels that do not vary: the reference does not fall to 0
    alike = torch.ones(50)
    assert constant_loss(Task("t", Binary()), torch.zeros(50, 1), alike) == pytest.approx(1e-3 * math.log(2))
    assert constant_loss(Task("t", Binary()), torch.zeros(50, 1), alike * float("nan")) is None


# ---- what goes wrong ----


class Poisoned(nn.Module):
    """A head whose output is not finite from a given call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.linear, self.left = nn.Linear(16, 1), calls

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.left -= 1
        return self.linear(z) * (float("nan") if self.left < 0 else 1.0)


def test_a_loss_that_is_not_finite_names_task_epoch_and_step_and_keeps_the_best_weights(diabetes) -> None:
    model = diabetes.model()
    steps = math.ceil(len(diabetes.train) / 64)
    model.heads[1] = Poisoned(2 * steps + 2)
    reference = diabetes.model()
    reference.heads[1] = Poisoned(10**9)
    reference.heads[1].linear.load_state_dict(model.heads[1].linear.state_dict())
    config = CPU.but(epochs=2)
    scores = train(reference, diabetes.tasks, diabetes.train, diabetes.validation, config=config).history["score"]
    with pytest.raises(TrainingError, match=r"epoch 3, step 3: the loss of task 'sex' is nan"):
        train(model, diabetes.tasks, diabetes.train, diabetes.validation, config=CPU)
    assert scores[1] > scores[0]
    for (name, p), q in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_infinite_inputs_are_told_at_exact_level_too(diabetes) -> None:
    inputs = diabetes.train.inputs.clone()
    inputs[5, 0] = float("inf")
    data = TaskData(inputs, diabetes.train.targets)
    with pytest.raises(TrainingError, match=r"epoch 1, step .*: the loss of task 'progression'"):
        train(diabetes.model(), diabetes.tasks, data, config=CPU.but(level="exact", accumulate=2, batch_size=16))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stop_on": "weight"}, "stop_on names 'weight'"),
        ({"device": "cuda"}, "device 'cuda' was asked for"),
        ({"precision": "fp16"}, "fp16' needs a GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentences are those of a machine without a GPU")
def test_settings_that_do_not_fit_are_refused_before_work(diabetes, change: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        train(diabetes.model(), diabetes.tasks, diabetes.train, diabetes.validation, config=CPU.but(**change))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"learning_rate": float("nan")},
        {"clip_norm": 0.0},
        {"warmup": 1.0},
        {"patience": 0},
        {"level": "L2"},
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig(**wrong)
    with pytest.raises(InputError, match="no training setting 'epoch'"):
        TrainConfig.from_json({"epoch": 3})


def test_settings_survive_json() -> None:
    config = TrainConfig(epochs=3, stop_on=None, clip_norm=None, schedule="cosine", warmup=0.1)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_data_that_does_not_fit_is_refused(diabetes) -> None:
    unlabelled = dict(diabetes.train.targets, sex=torch.full((len(diabetes.train),), float("nan")))
    with pytest.raises(InputError, match="task 'sex' has no label in the training data"):
        train(diabetes.model(), diabetes.tasks, TaskData(diabetes.train.inputs, unlabelled), config=CPU)
    with pytest.raises(InputError, match="the input has 5 rows, the labels of task 'sex' have 4"):
        TaskData(torch.zeros(5, 2), {"sex": torch.zeros(4)})
    with pytest.raises(InputError, match="no head for the task 'pressure'"):
        train(diabetes.model(names=("progression", "sex")), diabetes.tasks, diabetes.train, config=CPU)
    with pytest.raises(InputError, match=r"polytask\.wrap"):
        train(nn.Linear(8, 1), diabetes.tasks, diabetes.train, config=CPU)
    with pytest.raises(InputError, match="a batch is"):
        train(diabetes.model(), diabetes.tasks, [torch.zeros(4, 8)], config=CPU)


# ---- what is told on the way ----


def test_progress_counts_every_step_and_ends_with_nothing_left(diabetes) -> None:
    told: list[Progress] = []
    result = train(
        diabetes.model(), diabetes.tasks, diabetes.train, diabetes.validation, config=CPU, progress=told.append
    )
    ends = [p.epoch for p in told]
    assert set(ends) >= {1, 2, 3, 4}
    assert ends == sorted(ends)
    assert told[-1].ended == "epochs"
    assert told[-1].remaining == 0.0
    assert told[-1].step == told[-1].steps == result.steps
    assert told[-1].score == result.history["score"][-1]
    left = [p.remaining for p in told if p.remaining is not None]
    assert all(value >= 0 for value in left)


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_from_there(diabetes, same, tmp_path) -> None:
    def press(progress: Progress) -> None:
        if progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    unbroken, broken = diabetes.model(dropout=0.2), diabetes.model(dropout=0.2)
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    whole = train(unbroken, *arguments, balancer="famo", config=CPU)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        train(broken, *arguments, balancer="famo", config=CPU, folder=tmp_path, progress=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.checkpoint is not None
    assert caught.value.checkpoint.exists()
    assert caught.value.result.stopped == "interrupted"
    assert len(caught.value.result.history["epoch"]) == 2
    again = diabetes.model(dropout=0.2, seed=5)
    result = train(again, *arguments, balancer="famo", config=CPU, folder=tmp_path, resume=True)
    assert same(unbroken, again)
    assert result.history["score"] == whole.history["score"]


def test_interference_is_observed_as_often_as_asked(diabetes) -> None:
    config = CPU.but(observe_every=2)
    watched, plain = diabetes.model(dropout=0.2), diabetes.model(dropout=0.2)
    seen = train(watched, diabetes.tasks, diabetes.train, diabetes.validation, config=config).history["interference"]
    train(plain, diabetes.tasks, diabetes.train, diabetes.validation, config=CPU)
    assert seen["epochs"] == [2, 4]
    assert np.shape(seen["cosine"]) == (2, 3, 3)
    assert np.shape(seen["null"]) == (2, 3)
    for p, q in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)  # looking changes nothing


def test_a_wrapped_module_is_trained_at_exact_level(diabetes) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
            self.out = nn.ModuleDict({n: nn.Linear(16, 1) for n in diabetes.tasks})

        def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
            z = self.body(x)
            return OrderedDict((n, head(z)) for n, head in self.out.items())

    torch.manual_seed(0)
    module = Own()
    wrapped = wrap(module, shared=["body"], heads={n: f"out.{n}" for n in diabetes.tasks})
    twin = HardSharing(copy.deepcopy(module.body), {n: copy.deepcopy(head) for n, head in module.out.items()})
    arguments = (diabetes.tasks, diabetes.train, diabetes.validation)
    config = CPU.but(epochs=2, batch_size=32, accumulate=2)
    result = train(wrapped, *arguments, balancer="mgda", config=config)
    train(twin, *arguments, balancer="mgda", config=config.but(level="exact"))
    assert result.history["level"] == "exact"
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_every_epoch_visits_every_row_once_in_another_order() -> None:
    data = TaskData(torch.arange(103.0)[:, None], {"a": torch.zeros(103)})
    batches = Batches(data, batch_size=10, accumulate=3, seed=4)
    epochs = [torch.cat([x[:, 0] for step in batches.epoch(e) for x, _ in step]) for e in (0, 1, 0)]
    assert batches.steps == len(list(batches.epoch(0))) == 4
    assert all(torch.equal(e.sort().values, torch.arange(103.0)) for e in epochs)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    late = torch.cat([x[:, 0] for step in batches.epoch(0, start=2) for x, _ in step])
    assert torch.equal(late, epochs[0][60:])
    # two processes share every micro-batch and miss nothing
    halves = [
        torch.cat([x[:, 0] for step in Batches(data, batch_size=10, seed=4, share=(r, 2)).epoch(0) for x, _ in step])
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat(halves).sort().values, torch.arange(103.0))


def test_predictions_do_not_depend_on_the_batch_size(digits) -> None:
    model = digits.model()
    whole = predict_outputs(model, digits.tasks, digits.validation.inputs)
    parts = predict_outputs(model, digits.tasks, digits.validation.inputs, batch_size=17)
    assert np.allclose(whole["digit"]["probability"], parts["digit"]["probability"], rtol=1e-5)
    assert whole["digit"]["probability"].shape == (len(digits.validation), 10)
    assert whole["odd"]["probability"].shape == whole["odd"]["prediction"].shape == (len(digits.validation),)

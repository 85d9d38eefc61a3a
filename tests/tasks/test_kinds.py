"""Kinds of task: losses of each example, missing labels, decoding, metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import InputError
from polytask.tasks import (
    Binary,
    Count,
    Metric,
    Multiclass,
    Multilabel,
    Ordinal,
    Quantile,
    Regression,
    Task,
    Tasks,
    as_metric,
    kind_from_json,
)

KINDS = [
    Binary(),
    Multiclass(4),
    Multilabel(3),
    Regression(center=2.0, scale=3.0),
    Quantile((0.1, 0.5, 0.9), center=1.0, scale=2.0),
    Count(mean=2.5),
    Ordinal(5),
]


def labels(kind, n, generator):
    if isinstance(kind, Binary):
        return torch.randint(0, 2, (n,), generator=generator).double()
    if isinstance(kind, Multilabel):
        return torch.randint(0, 2, (n, kind.n_labels), generator=generator).double()
    if isinstance(kind, Multiclass | Ordinal):
        return torch.randint(0, kind.n_classes, (n,), generator=generator)
    if isinstance(kind, Count):
        return torch.poisson(torch.full((n,), 3.0, dtype=torch.float64), generator=generator)
    return torch.randn(n, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 30))
def test_every_example_has_a_loss_that_is_never_negative(kind, seed, size):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(17, kind.output_size, generator=generator, dtype=torch.float64) * size
    loss = kind.loss(raw, labels(kind, 17, generator))
    assert loss.shape == (17,)
    assert torch.isfinite(loss).all()
    assert (loss >= -1e-12).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_loss_gradient_matches_finite_differences(kind):
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(6, kind.output_size, generator=generator, dtype=torch.float64, requires_grad=True)
    target = labels(kind, 6, generator)
    assert torch.autograd.gradcheck(lambda r: kind.loss(r, target), (raw,))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_missing_labels_change_nothing(kind):
    generator = torch.Generator().manual_seed(0)
    task = Task("t", kind)
    raw = torch.randn(8, kind.output_size, generator=generator, dtype=torch.float64)
    target = labels(kind, 8, generator)
    holed = target.clone()
    holed[3:] = -1 if not holed.is_floating_point() else float("nan")
    torch.testing.assert_close(task.loss(raw, holed), task.loss(raw[:3], target[:3]))
    holed[:] = -100 if not holed.is_floating_point() else float("nan")
    assert task.loss(raw, holed) is None


def test_a_multilabel_example_is_charged_for_its_known_labels_only():
    raw = torch.tensor([[0.3, -2.0]])
    nan = float("nan")
    known = Multilabel(2).loss(raw, torch.tensor([[1.0, nan]]))
    torch.testing.assert_close(known, Binary().loss(raw[:, :1], torch.tensor([1.0])))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_kinds_survive_json(kind):
    import json

    again = kind_from_json(json.loads(json.dumps(kind.to_json())))
    assert again == kind
    task = Task("höhe", kind, classes=("a", 1, True))
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_ordinal_probabilities_are_a_distribution_and_follow_the_cumulative_logits():
    kind = Ordinal(6)
    raw = torch.randn(50, 5, dtype=torch.float64) * 4
    decoded = kind.decode(raw)
    assert (decoded["probability"] >= 0).all()
    torch.testing.assert_close(decoded["probability"].sum(1), torch.ones(50, dtype=torch.float64))
    assert (kind.cumulative_logits(raw).diff(dim=1) < 0).all()
    above = decoded["probability"].flip(1).cumsum(1).flip(1)[:, 1:]
    torch.testing.assert_close(above, torch.sigmoid(kind.cumulative_logits(raw)))


def test_regression_works_in_the_users_units():
    kind = Regression(center=100.0, scale=10.0)
    raw = torch.tensor([[0.5]])
    assert kind.decode(raw)["prediction"].item() == pytest.approx(105.0)
    assert kind.loss(raw, torch.tensor([105.0])).item() == pytest.approx(0.0, abs=1e-10)
    assert kind.loss(raw, torch.tensor([115.0])).item() == pytest.approx(1.0)


def test_count_loss_is_half_the_poisson_deviance():
    from sklearn.metrics import mean_poisson_deviance

    kind = Count(mean=2.0)
    raw, y = torch.randn(40, 1, dtype=torch.float64), torch.arange(40, dtype=torch.float64) % 7
    rate = kind.decode(raw)["prediction"].numpy()
    assert kind.loss(raw, y).mean().item() == pytest.approx(mean_poisson_deviance(y.numpy(), rate) / 2)


def test_pinball_loss_is_minimal_at_the_quantile():
    kind = Quantile((0.8,))
    y = torch.linspace(0, 1, 1001, dtype=torch.float64)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    cost = torch.stack([kind.loss(q.expand(1001, 1), y).mean() for q in grid])
    assert grid[cost.argmin()].item() == pytest.approx(0.8, abs=0.011)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Quantile((0.0, 0.5))


def test_tasks_leave_absent_ones_out_and_refuse_doubles():
    tasks = Tasks([Task("a", Binary()), Task("b", Regression()), Task("c", Multiclass(3))])
    outputs = {"a": torch.zeros(4, 1), "b": torch.zeros(4, 1), "c": torch.zeros(4, 3)}
    targets = {"a": torch.ones(4), "b": torch.full((4,), float("nan"))}
    assert list(tasks.losses(outputs, targets)) == ["a"]
    assert list(tasks.only(["c", "a"])) == ["a", "c"]
    with pytest.raises(InputError, match="two tasks are called 'a'"):
        Tasks([Task("a", Binary()), Task("a", Binary())])
    with pytest.raises(InputError, match="no task"):
        Tasks([])
    with pytest.raises(InputError, match="task 'a': 4 predictions but 5 labels"):
        tasks.losses(outputs, {"a": torch.ones(5)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_metrics_prefer_the_truth(kind):
    generator = torch.Generator().manual_seed(1)
    target = labels(kind, 200, generator)
    noise = kind.decode(torch.randn(200, kind.output_size, generator=generator, dtype=torch.float64) * 2)
    raw = torch.randn(200, kind.output_size, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        kind.loss(raw, target).sum().backward()
        optimizer.step()
    fitted = kind.decode(raw.detach())
    for metric in kind.metrics:
        good = metric(target.numpy(), {k: v.numpy() for k, v in fitted.items()})
        bad = metric(target.numpy(), {k: v.numpy() for k, v in noise.items()})
        assert (good > bad) == metric.higher_is_better, metric.name


def test_auc_of_one_class_is_undefined_not_an_error():
    auc = Binary().metrics[0]
    assert np.isnan(auc(np.ones(5), {"probability": np.linspace(0, 1, 5)}))


def test_torchmetrics_objects_are_recognised_without_the_package():
    class Accuracy:
        higher_is_better = True

        def reset(self):
            self.hits = self.n = 0

        def update(self, prediction, target):
            self.hits += int((prediction == target).sum())
            self.n += len(target)

        def compute(self):
            return torch.tensor(self.hits / self.n)

    metric = as_metric(Accuracy())
    assert metric.higher_is_better
    assert metric(np.array([1, 0, 1, 1]), {"prediction": np.array([1, 0, 0, 1])}) == 0.75
    assert as_metric(metric) is metric
    with pytest.raises(TypeError, match="torchmetrics"):
        as_metric(len)
    task = Task("t", Binary(), judged_by=(Accuracy(), Metric("m", lambda y, p: 0.0, False)))
    assert [m.name for m in task.metrics] == ["Accuracy", "m"]

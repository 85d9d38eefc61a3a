"""Interference is told where it is, and not where a task disagrees with itself as much."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from polytask.errors import InputError
from polytask.models import HardSharing
from polytask.tasks import Binary, Multiclass, Multilabel, Regression, Task, Tasks
from polytask.training import TaskData, diagnose
from polytask.training.diagnosis import _jackknife_p


class First(nn.Module):
    """A head without parameters: the tasks differ in their labels only."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z[:, :1]


def linear_problem(labels: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[HardSharing, Tasks, TaskData]:
    trunk = nn.Linear(x.shape[1], 1)
    nn.init.zeros_(trunk.weight)
    nn.init.zeros_(trunk.bias)
    tasks = Tasks(Task(n, Regression()) for n in labels)
    return HardSharing(trunk, {n: First() for n in labels}), tasks, TaskData(x, labels)


def test_opposed_tasks_conflict_and_a_task_does_not_conflict_with_itself(diabetes) -> None:
    x = diabetes.train.inputs
    y = (diabetes.train.targets["progression"] - 150) / 77
    model, tasks, data = linear_problem({"up": y, "down": -y, "again": y.clone()}, x)
    found = diagnose(model, data, tasks)
    assert found.cosine[0, 1] == pytest.approx(-1)  # at zero weights the gradients are exactly opposed
    assert found.cosine[0, 2] == pytest.approx(1)
    assert found.conflicting == ((0, 1), (1, 2))
    assert found.conflict_rate[0, 1] == 1.0
    assert len(found.sentences) == 3
    assert found.sentences[0].startswith("up and down pull")
    assert "Holm" in found.sentences[-1]


def test_noise_tasks_conflict_no_more_than_their_own_mini_batches() -> None:
    # labels without any signal: cosines of either sign, the same within and between tasks; 5 % of false alarms are allowed
    alarms = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(160, 20, generator=generator)
        labels = {n: torch.randn(160, generator=generator) for n in "abc"}
        model, tasks, data = linear_problem(labels, x)
        found = diagnose(model, data, tasks, batches=8, seed=seed)
        assert all(0.1 < rate < 0.9 for rate in found.null_conflict_rate)
        alarms += bool(found.conflicting)
    assert alarms <= 4  # 1 expected; more than 4 of 20 has probability 0.003 at 5 %


def test_cosines_are_those_of_the_exact_gradients(diabetes) -> None:
    model = diabetes.model(dropout=0.4)
    halves = [diabetes.train.rows(slice(0, 64)), diabetes.train.rows(slice(64, 128))]
    found = diagnose(model, [(h.inputs, h.targets) for h in halves], diabetes.tasks)
    model.eval()
    parameters = list(model.shared_parameters())
    rows = []
    for h in halves:
        losses = diabetes.tasks.losses(model(h.inputs), h.targets)
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses.values()]
        rows.append(torch.stack([torch.cat([g.flatten() for g in each]) for each in grads]))
    unit = [r / r.norm(dim=1, keepdim=True) for r in rows]
    assert np.allclose(found.cosine, sum((u @ u.T).numpy() for u in unit) / 2, rtol=1e-4, atol=1e-6)
    assert np.allclose(found.null, (unit[0] * unit[1]).sum(1).numpy(), rtol=1e-4, atol=1e-6)
    assert np.allclose(found.norm, sum(r.norm(dim=1).numpy() for r in rows) / 2, rtol=1e-4)
    assert found.conflicting == ()  # two mini-batches are too few for any test
    assert np.isnan(found.p_value).all()


def test_looking_changes_nothing(diabetes) -> None:
    model = diabetes.model(dropout=0.4).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (diagnose(model, diabetes.train, diabetes.tasks, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert first.to_json() == second.to_json()


def test_json_is_plain_and_says_none_where_nothing_is_known(diabetes) -> None:
    targets = dict(diabetes.train.targets, sex=torch.full((len(diabetes.train),), float("nan")))
    found = diagnose(diabetes.model(), TaskData(diabetes.train.inputs, targets), diabetes.tasks).to_json()
    plain = json.loads(json.dumps(found, allow_nan=False))
    assert plain["cosine"][0][1] is None
    assert plain["null"][1] is None
    assert plain["cosine"][0][2] is not None


def test_the_jackknife_sees_a_difference_and_keeps_its_error_rate() -> None:
    # vectors around a common mean: cosines between the two sets and within one have the same expectation, so p < 5 % in 5 % of the cases
    rng = np.random.default_rng(0)

    def p_value(mean: float, sign: float) -> float:
        g, h = (rng.normal(size=(8, 50)) + mean for _ in range(2))
        unit, other = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (g, h))
        return _jackknife_p(sign * (unit * other).sum(1), unit @ unit.T)

    assert 0.02 < np.mean([p_value(0.2, 1.0) < 0.05 for _ in range(300)]) < 0.10
    assert all(p_value(1.0, -1.0) < 1e-3 for _ in range(20))
    assert np.isnan(_jackknife_p(np.zeros(2), np.eye(2)))


def test_one_task_has_nothing_to_interfere_with(diabetes) -> None:
    with pytest.raises(InputError, match="at least two tasks"):
        diagnose(diabetes.model(), diabetes.train, diabetes.tasks.only(["sex"]))
    part = diabetes.train.rows(slice(0, 20))
    with pytest.raises(InputError, match="at least two mini-batches"):
        diagnose(diabetes.model(), [(part.inputs, part.targets)], diabetes.tasks)


class Outputs(nn.Module):
    """Somebody's module: nothing of it is ours."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(5, 6), nn.ModuleDict({n: nn.Linear(6, size) for n, size in sizes.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {n: head(self.trunk(x).tanh()) for n, head in self.heads.items()}


def labelled_batches(number: int = 4) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(1)

    def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        labels = {
            "number": torch.randn(16, generator=draw),
            "class": torch.randint(0, 3, (16,), generator=draw),
            "flag": torch.randint(0, 2, (16,), generator=draw).float(),
            "flags": torch.randint(0, 2, (16, 2), generator=draw).float(),
        }
        return torch.randn(16, 5, generator=draw), labels

    return [batch() for _ in range(number)]


def test_any_model_and_loader_tell_their_tasks() -> None:
    model, batches = Outputs({"number": 1, "class": 3, "flag": 1, "flags": 2}), labelled_batches()
    tasks = Tasks(
        [
            Task("number", Regression()),
            Task("class", Multiclass(3)),
            Task("flag", Binary()),
            Task("flags", Multilabel(2)),
        ]
    )

    def by_hand(m: nn.Module, batch) -> dict[str, torch.Tensor]:
        return tasks.losses(m(batch[0]), batch[1])

    found = diagnose(model, batches)
    assert found.tasks == ("number", "class", "flag", "flags")
    for other in (diagnose(model, batches, tasks), diagnose(model, batches, by_hand)):
        np.testing.assert_allclose(other.cosine, found.cosine, rtol=1e-12)
    with torch.no_grad():
        np.testing.assert_allclose(diagnose(model, batches, shared=model.trunk).cosine, found.cosine, atol=1e-6)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_labels_one_after_another_and_models_that_return_losses() -> None:
    model = Outputs({"number": 1, "flag": 1})
    batches = [(x, {n: y[n] for n in ("number", "flag")}) for x, y in labelled_batches()]
    expected = diagnose(model, batches).cosine
    apart = [(x, *y.values()) for x, y in batches]
    joined = [(x, torch.stack(list(y.values()), 1)) for x, y in batches]
    numbers = Tasks([Task("number", Regression()), Task("flag", Binary())])
    np.testing.assert_allclose(diagnose(model, apart).cosine, expected, rtol=1e-12)
    np.testing.assert_allclose(diagnose(model, joined).cosine, diagnose(model, apart, numbers).cosine, rtol=1e-12)

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x, labels) -> dict[str, torch.Tensor]:
            return numbers.losses(self.inner(x), labels)

    named = [{"x": x, "labels": y} for x, y in batches]
    np.testing.assert_allclose(diagnose(Losses(), named).cosine, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "batches", "sentence"),
    [
        (nn.ReLU(), [], "no parameters"),
        (nn.Linear(5, 1), labelled_batches(), "the model returned Tensor"),
        (Outputs({"number": 1, "flag": 1}), [torch.randn(4, 5)] * 3, "labels of the tasks number, flag are expected"),
        (Outputs({"number": 2, "flag": 1}), labelled_batches(), "what kind of task 'number' is cannot be told"),
        (Outputs({"number": 1, "flag": 1}), labelled_batches(1), "at least two mini-batches, and there are 1"),
        (Outputs({"number": 1}), labelled_batches(), "nothing is shared|at least two tasks"),
    ],
)
def test_what_cannot_be_diagnosed_is_said(model, batches, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        diagnose(model, batches)


def test_a_diagnosis_is_shown_as_table_sentences_and_heat_map() -> None:
    found = diagnose(
        Outputs({"number": 1, "class": 3}), [(x, {"a<b": y["number"], **y}) for x, y in labelled_batches()]
    )
    text = str(found)
    assert text.startswith("Cosine between task gradients over 4 mini-batches\n")
    assert f"{found.cosine[0, 1]:.2f}".replace("-", "−") in found.table()
    assert all(s in text for s in found.sentences)
    page = ElementTree.fromstring(found.heat_map())
    cells = [t.text for t in page.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{found.null[1]:.2f}".replace("-", "−") in cells
    assert len(page.findall("{http://www.w3.org/2000/svg}rect")) == 4
    assert all(s.partition(":")[0] in found._repr_html_() for s in found.sentences)

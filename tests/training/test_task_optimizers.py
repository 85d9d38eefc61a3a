"""Optimizers that are told single tasks' losses, in the training loop: by name, exact, resumable."""

from __future__ import annotations

import itertools

import pytest
import torch

from polytask.balancing import make
from polytask.errors import InputError
from polytask.optim import DualOptimPlus, MAdam, MTAdam
from polytask.training import TrainConfig, train
from polytask.training.optimizers import optimizer_for

CONFIG = TrainConfig(epochs=3, batch_size=64, device="cpu", patience=None, learning_rate=3e-3, checkpoint_every=2)
NAMES = ["mtadam", "adatask", "madam", "dualoptim_plus"]


def run(problem, optimizer, config=CONFIG, seed=0, **options):
    model = problem.model(dropout=0.2, seed=seed)
    result = train(
        model, problem.tasks, problem.train, problem.validation, config=config, optimizer=optimizer, **options
    )
    return model, result


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_named_ones_learn(diabetes, name):
    _, result = run(diabetes, name, CONFIG.but(epochs=8, learning_rate=1e-2))
    assert result.best_score > 0.05  # share of the constant prediction's loss that is explained
    weights = result.history["weights"]
    expected = 1.0 if name != "dualoptim_plus" else 1 / len(diabetes.tasks)
    for task in diabetes.tasks:
        assert weights[task][-1] == pytest.approx(expected, rel=0.3 if name == "dualoptim_plus" else 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_weights(diabetes, name, tmp_path):
    whole, reference = run(diabetes, name)

    class PowerCut(Exception):
        pass

    steps = itertools.count()

    def cut(module, *_):
        if module.training and next(steps) == 8:
            raise PowerCut

    model = diabetes.model(dropout=0.2)
    model.register_forward_hook(cut)
    with pytest.raises(PowerCut):
        train(
            model, diabetes.tasks, diabetes.train, diabetes.validation, config=CONFIG, optimizer=name, folder=tmp_path
        )
    again, result = run(diabetes, name, seed=1, folder=tmp_path, resume=True)
    assert result.steps == reference.steps
    assert same(again, whole)


def test_a_loop_of_one_s_own_gives_the_same_weights(diabetes):
    config = CONFIG.but(epochs=1, clip_norm=None, batch_size=1000, weight_decay=0.0)  # one step on all rows
    trained, by_hand = diabetes.model(), diabetes.model()
    train(trained, diabetes.tasks, diabetes.train, config=config, optimizer="mtadam")
    optimizer = MTAdam(by_hand.parameters(), lr=config.learning_rate)
    optimizer.backward(diabetes.tasks.losses(by_hand(diabetes.train.inputs), diabetes.train.targets))
    optimizer.step()
    for p, q, start in zip(trained.parameters(), by_hand.parameters(), diabetes.model().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, start)


@pytest.mark.parametrize("name", ["mtadam", "adatask", "madam"])
def test_micro_batches_add_up_to_the_batch(diabetes, name):
    def weights(accumulate):
        model = diabetes.model(dropout=0.0).double()
        data = diabetes.train.rows(slice(0, 256))
        data = type(data)(data.inputs.double(), data.targets)
        config = CONFIG.but(epochs=2, batch_size=64 // accumulate, accumulate=accumulate, clip_norm=None)
        train(model, diabetes.tasks, data, config=config, optimizer=name)
        return model

    for p, q in zip(weights(1).parameters(), weights(4).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_balancers_serve_where_something_is_left_to_decide(diabetes):
    for balancer in ("mgda", "dwa", "equal"):
        _, result = run(diabetes, "madam", CONFIG.but(epochs=1), balancer=balancer)
        assert result.history["weights"]["progression"][0] is not None
    favoured = dict.fromkeys(diabetes.tasks, 1.0) | {"progression": 8.0}
    _, result = run(diabetes, "adatask", CONFIG.but(epochs=1), balancer=make("equal", preference=favoured))
    w = {n: course[0] for n, course in result.history["weights"].items()}
    assert w["progression"] == pytest.approx(8 * w["sex"])
    with pytest.raises(InputError, match="balances the gradients itself"):
        run(diabetes, "mtadam", balancer="mgda")
    with pytest.raises(InputError, match="take turns"):
        run(diabetes, "dualoptim_plus", balancer="uncertainty")


def test_objects_and_functions_are_taken_as_they_are(diabetes):
    model = diabetes.model()
    optimizer = MAdam(torch.optim.SGD(model.parameters(), lr=0.01), cross="diag")
    train(model, diabetes.tasks, diabetes.train, config=CONFIG.but(epochs=1), optimizer=optimizer)
    assert optimizer.steps > 0
    assert [id(p) for p in optimizer.shared] == [id(p) for p in model.shared_parameters()]
    model = diabetes.model()
    factors = dict.fromkeys(diabetes.tasks, 1.0)
    train(
        model,
        diabetes.tasks,
        diabetes.train,
        config=CONFIG.but(epochs=1),
        optimizer=lambda ps: DualOptimPlus(ps, factors, lr=1e-3),
    )


def test_what_does_not_fit_is_refused_before_the_first_step(diabetes, tmp_path):
    with pytest.raises(InputError, match="no optim method called 'mtadm'"):
        run(diabetes, "mtadm")
    with pytest.raises(InputError, match="leave out level='representation'"):
        run(diabetes, "adatask", CONFIG.but(level="representation"))
    with pytest.raises(InputError, match="in one process only"):
        optimizer_for(diabetes.model(), tuple(diabetes.tasks), CONFIG, "mtadam", processes=2)
    with pytest.raises(InputError, match="serves the tasks forget, retain"):
        run(diabetes, lambda ps: DualOptimPlus(ps, {"forget": 1.0, "retain": 1.0}))
    run(diabetes, "mtadam", CONFIG.but(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match="the optimizer 'MTAdam', not 'AdaTask'"):
        run(diabetes, "adatask", folder=tmp_path, resume=True)


def test_a_group_s_decay_is_multiplied_into_its_rate_at_every_step(diabetes):
    model = diabetes.model()
    heads = list(model.heads.parameters())
    groups = [{"params": list(model.trunk.parameters())}, {"params": heads, "lr": 0.02, "decay": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    result = train(model, diabetes.tasks, diabetes.train, config=CONFIG.but(epochs=2), optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.02 * 0.9 ** (result.steps - 1))

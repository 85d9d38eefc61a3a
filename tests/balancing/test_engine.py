"""``polytask.backward``: what stands in ``.grad`` afterwards, at every level, and what is refused before anything is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import GradientAggregator, GramianWeighting, make
from polytask.errors import InputError, TrainingError
from polytask.models import HardSharing

NAMES = ("a", "b", "c")


class Fixed(GramianWeighting):
    """Weights that show which task is which: 1, 10, 100."""

    method = make("equal").method

    def initial_state(self, n_tasks):
        return {"w": [10.0**i for i in range(n_tasks)]}

    def solve(self, C, losses):
        import numpy as np

        return np.asarray(self.state["w"])[self.active]


class FixedRows(GradientAggregator):
    method = make("equal").method

    def aggregate(self, J, losses):
        return (10.0 ** torch.arange(len(J), dtype=J.dtype)) @ J


def model(deep_heads=False, dtype=torch.float64):
    torch.manual_seed(0)
    head = (
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)))
        if deep_heads
        else (lambda: nn.Linear(6, 1))
    )
    return HardSharing(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), {n: head() for n in NAMES}).to(dtype)


def losses_of(m, names=NAMES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator, dtype=dtype)
    y = torch.randn(16, 3, generator=generator, dtype=dtype)
    outputs = m(x)
    return {n: ((outputs[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate(NAMES) if n in names}


def gradients(m):
    return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}


def expected(m, weights, weigh_heads=False):
    found = {}
    for k, (_, loss) in enumerate(losses_of(m).items()):
        g = torch.autograd.grad(loss, list(m.parameters()), retain_graph=True, allow_unused=True)
        for (n, _), gk in zip(m.named_parameters(), g, strict=True):
            if gk is not None:
                factor = weights[k] if weigh_heads or n.startswith("trunk") else 1.0
                found[n] = found.get(n, 0) + factor * gk
    return found


@pytest.mark.parametrize("deep_heads", [False, True])
@pytest.mark.parametrize("balancer", [Fixed, FixedRows])
@pytest.mark.parametrize("how", ["exact", "exact inferred", "exact streamed", "one pass", "two passes"])
def test_shared_parameters_get_the_combination_and_heads_their_own(deep_heads, balancer, how, monkeypatch):
    if how == "exact streamed":
        monkeypatch.setattr("polytask.balancing.exact.STREAM_ABOVE", 0)
    m = model(deep_heads)
    losses = losses_of(m)
    arguments = {
        "exact": {"shared": m.trunk, "level": "exact"},
        "exact inferred": {},
        "exact streamed": {},
        "one pass": {"features": m.features},
        "two passes": {"features": m.features["features"].tensor},
    }[how]
    polytask.backward(losses, balancer=balancer(), **arguments)
    reference = expected(m, (1.0, 10.0, 100.0))
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, reference[n], msg=n)


def test_loss_weights_reach_the_heads_too():
    m = model()
    polytask.backward(losses_of(m), balancer=make("equal", preference=[1, 2, 3]))
    reference = expected(m, (0.5, 1.0, 1.5), weigh_heads=True)
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, reference[n], msg=n)


def test_representation_gramian_is_the_definition_and_observing_does_not_change_the_step():
    m = model(deep_heads=True)
    losses = losses_of(m)
    z = m.features["features"].tensor
    rows = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses.values()])
    seen = polytask.backward(losses, balancer=make("equal", preference=[1, 2, 3]), features=m.features, observe=True)
    torch.testing.assert_close(seen.gramian, rows @ rows.T)
    plain = gradients(m)
    m.zero_grad()
    polytask.backward(losses_of(m), balancer=make("equal", preference=[1, 2, 3]))
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, plain[n], msg=n)


@pytest.mark.parametrize("level", ["exact", "representation"])
def test_exact_gramian_is_that_of_the_jacobian(level):
    m = model()
    losses = losses_of(m)
    seen = polytask.backward(losses, shared=m.trunk, balancer="mgda", features=m.features, level=level)
    assert seen.level == level
    if level == "exact":
        J = torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, list(m.trunk.parameters()), retain_graph=True)]
                )
                for loss in losses_of(m).values()
            ]
        )
        torch.testing.assert_close(seen.gramian, J @ J.T)


@pytest.mark.parametrize("features", [True, False])
def test_absent_tasks_are_left_out_and_keep_their_place(features):
    m = model(deep_heads=features)
    balancer = Fixed()
    balancer.bind(NAMES)
    polytask.backward(losses_of(m, ("c", "a")), balancer=balancer, features=m.features if features else None)
    reference = {}
    for n, w in (("a", 1.0), ("c", 100.0)):
        for name, g in zip(
            [k for k, _ in m.trunk.named_parameters()],
            torch.autograd.grad(losses_of(m)[n], list(m.trunk.parameters())),
            strict=True,
        ):
            reference[name] = reference.get(name, 0) + w * g
    for name, p in m.trunk.named_parameters():
        torch.testing.assert_close(p.grad, reference[name])
    assert all(p.grad is None or not p.grad.any() for p in m.task_parameters("b"))


def test_gradients_are_added_as_backward_does():
    m = model()
    polytask.backward(losses_of(m), balancer=Fixed(), level="exact")
    once = gradients(m)
    polytask.backward(losses_of(m), balancer=Fixed(), level="exact")
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, 2 * once[n])


@pytest.mark.parametrize("level", ["auto", "exact", "representation"])
@pytest.mark.parametrize("name", ["equal", "mgda"])
def test_gradient_scaler_multiplies_every_gradient_and_changes_no_weight(level, name):
    m = model()
    features = None if level == "exact" else m.features
    losses = losses_of(m)
    features = None if level == "exact" else m.features
    plain = polytask.backward(losses, balancer=make(name), features=features, level=level)
    reference = gradients(m)
    m.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    losses = losses_of(m)
    scaled = polytask.backward(
        losses, balancer=make(name), features=None if level == "exact" else m.features, level=level, scaler=scaler
    )
    torch.testing.assert_close(scaled.weights, plain.weights)
    if plain.gramian is not None:
        torch.testing.assert_close(scaled.gramian, plain.gramian)
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, reference[n] * 2.0**12)
    scaler.step(torch.optim.SGD(m.parameters(), lr=0.1))
    scaler.update()


@pytest.mark.parametrize("deep_heads", [False, True])
def test_bfloat16_autocast_gives_nearly_the_float32_step(deep_heads):
    m = model(deep_heads, torch.float32)
    polytask.backward(losses_of(m, dtype=torch.float32), balancer="mgda", features=m.features)
    losses = losses_of(m, dtype=torch.float32)
    m.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(m, dtype=torch.float32)
    seen = polytask.backward(losses, balancer="mgda", features=m.features)
    assert seen.weights.sum().item() == pytest.approx(1.0, rel=1e-3)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in m.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_at_representation_level(reentrant):
    from torch.utils.checkpoint import checkpoint

    m = model(deep_heads=True)
    polytask.backward(losses_of(m), balancer=Fixed(), features=m.features)
    reference = gradients(m)
    m.zero_grad()
    body = m.trunk
    first = body[0].forward
    body[0].forward = lambda x: checkpoint(first, x.requires_grad_(), use_reentrant=reentrant)
    polytask.backward(losses_of(m), balancer=Fixed(), features=m.features)
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, reference[n], msg=n)


@pytest.mark.parametrize("level", ["auto", "exact"])
def test_one_task_is_plain_backward(level):
    m = model()
    loss = {"a": losses_of(m)["a"]}
    polytask.backward(loss, balancer="mgda", level=level)
    reference = torch.autograd.grad(losses_of(m)["a"], list(m.trunk.parameters()))
    for p, g in zip(m.trunk.parameters(), reference, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_sequences_and_vectors_of_losses():
    m = model()
    vector = torch.stack(list(losses_of(m).values()))
    polytask.backward(vector)
    by_vector = gradients(m)
    m.zero_grad()
    polytask.backward(list(losses_of(m).values()))
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, by_vector[n])


def untouched(m):
    return all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda m, ls: dict(losses={**ls, "b": ls["b"] * float("nan")}), TrainingError, "loss of task 'b' is nan"),
        (lambda m, ls: dict(losses={**ls, "b": ls["b"] + float("inf")}), TrainingError, "loss of task 'b' is inf"),
        (lambda m, ls: dict(losses={**ls, "b": ls["a"]}), InputError, "same loss was given for the tasks 'a' and 'b'"),
        (lambda m, ls: dict(losses={**ls, "b": ls["b"].detach()}), InputError, "loss of task 'b' has no graph"),
        (
            lambda m, ls: dict(losses={**ls, "b": torch.stack([ls["b"], ls["b"]])}),
            InputError,
            r"must be a scalar tensor, not shape \(2,\)",
        ),
        (lambda m, ls: dict(losses={**ls, "b": 1.0}), InputError, "must be a scalar tensor, not float"),
        (lambda m, ls: dict(losses={}), InputError, "no loss"),
        (lambda m, ls: dict(losses=ls, shared=nn.Linear(2, 2), level="exact"), InputError, "no loss reaches any"),
        (
            lambda m, ls: dict(losses=ls, shared=[*m.trunk.parameters(), nn.Parameter(torch.zeros(7))], level="exact"),
            InputError,
            r"no loss reaches shared parameter number 2 of shape \(7,\)",
        ),
        (lambda m, ls: dict(losses=ls, level="representation"), InputError, "needs features="),
        (
            lambda m, ls: dict(losses=ls, features=torch.randn(3, requires_grad=True).tanh()),
            InputError,
            "no loss depends on the given features",
        ),
        (
            lambda m, ls: dict(losses=ls, balancer="nosuchmethod"),
            InputError,
            "no balancing method called 'nosuchmethod'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_any_gradient(spoil, error, sentence):
    m = model()
    arguments = {"balancer": "mgda", **spoil(m, losses_of(m))}
    with pytest.raises(error, match=sentence):
        polytask.backward(**arguments)
    assert untouched(m)


def test_a_gradient_that_is_not_finite_names_its_task():
    m = model()
    losses = losses_of(m)
    bad = losses["b"] + (m.trunk[0].weight.sum() * 0.0).sqrt()
    with pytest.raises(TrainingError, match="gradient of 'b' is not finite"):
        polytask.backward({**losses, "b": bad}, balancer="mgda", level="exact")
    assert untouched(m)


def test_a_head_parameter_listed_as_shared_is_refused():
    m = model()
    with pytest.raises(InputError, match="only the loss of 'a' reaches"):
        polytask.backward(
            losses_of(m), shared=[*m.trunk.parameters(), *m.task_parameters("a")], balancer="mgda", level="exact"
        )
    assert untouched(m)


@pytest.mark.parametrize("preference", [[1.0, 2.0], [1.0, -1.0, 1.0], [0.0, 1.0, 1.0], {"a": 1.0, "b": 1.0, "x": 1.0}])
def test_wrong_preferences_are_refused(preference):
    m = model()
    with pytest.raises(InputError, match="preference"):
        polytask.backward(losses_of(m), balancer=make("equal", preference=preference))
    assert untouched(m)


def test_a_task_never_announced_is_refused():
    m = model()
    balancer = make("equal")
    balancer.bind(["a", "b"])
    with pytest.raises(InputError, match="c is not one of them"):
        polytask.backward(losses_of(m), balancer=balancer)


def test_log_losses_divide_each_gradient_by_its_loss():
    m = model()
    losses = losses_of(m)
    values = [loss.item() for loss in losses.values()]
    polytask.backward(losses, balancer=make("equal", log_losses=True), shared=m.trunk)
    reference = expected(m, [1 / v for v in values], weigh_heads=True)
    for n, g in gradients(m).items():
        torch.testing.assert_close(g, reference[n], msg=n)


@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("balancer", [Fixed, FixedRows])
def test_losses_taken_together_make_the_same_step(balancer, together):
    one, several = model(deep_heads=True), model(deep_heads=True)
    polytask.backward(losses_of(one), shared=one.trunk, balancer=balancer(), level="exact")
    polytask.backward(losses_of(several), shared=several.trunk, balancer=balancer(), level="exact", together=together)
    for p, q in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(InputError, match="together=0"):
        polytask.backward(losses_of(one), shared=one.trunk, balancer=balancer(), level="exact", together=0)


def test_a_probe_decides_once_and_is_remembered(monkeypatch):
    from polytask.autograd import probing

    asked = []
    monkeypatch.setattr(probing, "_seconds", lambda *a: asked.append(a[-1]) or {1: 3.0, 2: 1.0, 3: 2.0}[a[-1]])
    m, balancer = model(deep_heads=True), make("mgda")
    for _ in range(2):
        polytask.backward(losses_of(m), shared=m.trunk, balancer=balancer, level="exact", together="probe")
        assert asked == [1, 1, 2, 2, 3, 3]
    assert list(balancer.probed.values()) == [2]
    again = make("mgda")
    again.load_state_dict(balancer.state_dict())
    polytask.backward(losses_of(m), shared=m.trunk, balancer=again, level="exact", together="probe")
    assert asked == [1, 1, 2, 2, 3, 3]
    reference = model(deep_heads=True)
    for _ in range(3):
        polytask.backward(losses_of(reference), shared=reference.trunk, balancer="mgda", level="exact")
    for p, q in zip(m.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_hooks_on_tensors_of_a_wide_network_count_at_exact_level(limit):
    """Layer by layer the graph is walked without the engine, which alone calls hooks."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    heads = [nn.Linear(256, 1) for _ in range(4)]
    balancer = make("mgda")
    for _ in range(2):
        z = trunk(torch.randn(8, 256))
        z.register_hook(lambda g: g if limit is None else g.clamp(-limit, limit))
        losses = [(k + 1.0) * head(z).square().mean() for k, head in enumerate(heads)]
        J = [torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True) for loss in losses]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in J])
        trunk.zero_grad()
        polytask.backward(losses, shared=trunk, balancer=balancer, level="exact")
        found = torch.cat([p.grad.flatten() for p in trunk.parameters()])
        assert (found - make("mgda").direction(J)).norm() <= 1e-4 * J.norm()
    assert list(balancer.workspace.walks.values()) == [limit is None]

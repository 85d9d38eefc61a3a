"""Methods called by hand: what ``make``, ``weights``, ``direction`` and ``load_state_dict`` take, and what they refuse in a sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from polytask.balancing import GramianWeighting, LossWeighting, make
from polytask.balancing.looks import LookingBalancer
from polytask.errors import InputError
from polytask.registry import Method

from .conftest import METHODS, build, gradients, losses, run, script

GRAMIAN = [m for m in METHODS.values() if issubclass(m.factory, GramianWeighting)]
J, L = gradients(3, 4, 20), losses(3, 4)


def test_state_passes_through_torch_load_as_data(method: Method) -> None:
    steps = script(3)
    straight, first, second = build(method), build(method), build(method, seed=9)
    expected = run(straight, steps, ["x", "y", "z"])[5:]
    run(first, steps[:5], ["x", "y", "z"])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    found = run(second, steps[5:], ["x", "y", "z"], first=5)
    assert all(torch.equal(d, e) for d, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("zeros", [[0, 0, 0, 0], [1, 0, 1, 1]])
def test_losses_of_zero_poison_nothing(method: Method, zeros: list[int]) -> None:
    """A loss of 0 is at its minimum: its gradient is 0, and the step is finite whatever weight it gets, now and later."""
    b, solved = build(method), torch.tensor(zeros, dtype=torch.float64)
    assert bool(torch.isfinite(b.direction(J * solved[:, None], L * solved)).all())
    assert bool(torch.isfinite(b.direction(J, L)).all())
    single = build(method)
    for _ in range(3):
        assert bool(torch.isfinite(single.direction((J * solved[:, None]).float(), (L * solved).float())).all())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_rounding_alone_sets_apart(method: Method, dtype: torch.dtype) -> None:
    for seed, noise in enumerate((0.0, 1e-16, 1e-8, 1e-7)):
        rows = (1 + noise * gradients(seed, 20, 31)).to(dtype)
        d = build(method).direction(rows, losses(seed, 20).to(dtype))
        assert bool(torch.isfinite(d).all())


def test_integers_are_numbers(method: Method) -> None:
    whole = torch.tensor([1, 2, 3, 4])
    assert torch.equal(build(method).direction(J, whole), build(method).direction(J, whole.float()))
    found = build(method).direction((10 * J).round().long(), whole)
    assert found.dtype == torch.float32
    assert torch.equal(found, build(method).direction((10 * J).round().float(), whole))


@pytest.mark.parametrize(
    ("jacobian", "values", "sentence"),
    [
        (J[0], L, r"one row a task, not shape \(20,\)"),
        (J.view(4, 4, 5), L, r"one row a task, not shape \(4, 4, 5\)"),
        (J.tolist(), L, "tensor, not of type list"),
        (J.numpy(), L, "tensor, not of type ndarray"),
        (torch.complex(J, J), L, "is real"),
        (J[:0], L[:0], "no task to balance"),
        (J, L[:3], r"one number for each of 4 tasks, not shape \(3,\)"),
        (J, L[:, None], r"one number for each of 4 tasks, not shape \(4, 1\)"),
        (J, {"a": 1.0}, "one number a task, and was given as dict"),
        (J, L * torch.tensor([1.0, torch.nan, 1.0, 1.0]), "the loss of task '1' is nan"),
        (J * torch.tensor([1.0, 1.0, torch.inf, 1.0])[:, None], L, "the gradients of 2 are not finite"),
        (torch.where(J[2, 5] == J, torch.nan, J), L, "the gradients of 2 are not finite"),
    ],
)
def test_what_is_no_jacobian_and_no_losses(method: Method, jacobian, values, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build(method).direction(jacobian, values)


@pytest.mark.parametrize("entry", GRAMIAN, ids=[m.name for m in GRAMIAN])
def test_what_is_no_gramian(entry: Method) -> None:
    C = J @ J.T
    skew, long = C.clone(), C.clone()
    skew[0, 1] += C[0, 0]
    long[0, 1] = long[1, 0] = 2 * C.diagonal().max()
    spoilt = (
        C
        + torch.where(torch.arange(4) == 2, torch.nan, 0.0)
        + torch.where(torch.arange(4) == 2, torch.nan, 0.0)[:, None]
    )
    for bad, sentence in (
        (C[0], "square, not of shape"),
        (C.numpy(), "not of type ndarray"),
        (C - 2 * C.diagonal().diag(), r"squared lengths, and entry \(\d, \d\) is -"),
        (skew, r"symmetric, and entries \(0, 1\) and \(1, 0\)"),
        (long, "no two vectors have the inner product"),
        (spoilt, "the gradients of 2 are not finite"),
    ):
        with pytest.raises(InputError, match=sentence):
            build(entry).weights(bad, L)
    with pytest.raises(InputError, match="one number for each of 4 tasks"):
        build(entry).weights(C, L[:2])
    whole = torch.tensor([[4, 1], [1, 2]])
    assert torch.equal(build(entry).weights(whole, L[:2]), build(entry).weights(whole.float(), L[:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0.0, 3.0])
def test_rounding_makes_no_gramian_wrong(dtype: torch.dtype, decades: float) -> None:
    for seed in range(30):
        rows = gradients(seed, 2 + seed % 6, 1 + seed % 9, decades).to(dtype)
        assert bool(torch.isfinite(make("mgda").weights(rows @ rows.T)).all())


def test_methods_that_read_no_loss_need_none() -> None:
    for name in ("equal", "rlw"):
        assert torch.equal(make(name).direction(J), make(name).direction(J, L))
    with pytest.raises(InputError, match="give losses="):
        make("dwa").direction(J)
    assert not any(issubclass(METHODS[n].factory, LossWeighting) for n in ("upgrad", "graddrop"))


def test_other_words_for_preference_and_seed() -> None:
    for name in ("equal", "upgrad", "graddrop", "modo"):
        wanted = make(name, preference=[1, 2, 3, 4]).direction(J, L)
        assert torch.equal(make(name, weights=[1, 2, 3, 4]).direction(J, L), wanted)
    for draw in (lambda: torch.Generator().manual_seed(5), lambda: np.random.default_rng(5)):
        one, same = (make("pcgrad", generator=draw()) for _ in range(2))
        assert one.seed == same.seed
        assert torch.equal(one.direction(J), same.direction(J))
    assert make("rlw", generator=torch.Generator().manual_seed(6)).seed != make("rlw", generator=draw()).seed
    for options, sentence in (
        ({"weights": [1, 2], "preference": [1, 2]}, "both weights= and preference="),
        ({"weights": [1, -2]}, "one positive number a task"),
        ({"prefrence": [1, 2]}, "no option 'prefrence'; did you mean preference"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "x"}, "seed='x'"),
    ):
        with pytest.raises(InputError, match=sentence):
            make("upgrad", **options)
    with pytest.raises(InputError, match="by its name, not by None"):
        make(None)


def test_a_state_that_belongs_elsewhere() -> None:
    famo, upgrad = make("famo"), make("upgrad")
    famo.bind(["a", "b"])
    for balancer, state, sentence in (
        (upgrad, {}, "it has no 'tasks'"),
        (upgrad, famo.state_dict(), "it is another method's"),
        (make("famo", preference=[1, 2, 3]), famo.state_dict(), "3 numbers for 2 tasks"),
    ):
        with pytest.raises(InputError, match=sentence):
            balancer.load_state_dict(state)
    three = make("famo")
    three.direction(J[:3], L[:3])
    three.load_state_dict(famo.state_dict())
    with pytest.raises(InputError, match="serves 2 tasks and was given 3"):
        three.direction(J[:3], L[:3])


def test_logarithms_by_hand(method: Method) -> None:
    """The gradient of log L is that of L divided by L."""
    taken, plain = build(method, log_losses=True), build(method, log_losses=False)
    if isinstance(taken, LookingBalancer):  # they look where the logarithm's slope is another
        assert bool(torch.isfinite(taken.direction(J, L)).all())
        return
    expected = plain.direction(J, L) if plain.takes_logarithms else plain.direction(J / L[:, None], L.log())
    torch.testing.assert_close(taken.direction(J, L), expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))
    if isinstance(taken, GramianWeighting):
        w = build(method, log_losses=True).weights(J @ J.T, L)
        torch.testing.assert_close(w @ J, expected, rtol=1e-6, atol=1e-7 * float(expected.norm()))


def test_logarithms_of_losses_below_one(method: Method) -> None:
    b = build(method, log_losses=True)
    for step in range(6):
        d = b.direction(J, L * 0.3 * 0.9**step)
        assert bool(torch.isfinite(d).all())
        assert float(d.norm()) < 1e4 * float(J.norm())


def test_inverse_keeps_logarithms_from_rising_to_zero() -> None:
    b = make("inverse", log_losses=True)
    first = torch.tensor([0.5, 0.01], dtype=torch.float64)
    w = b.weights(first) * first  # by the logarithms
    torch.testing.assert_close(w, -1 / first.log())
    nearer = torch.tensor([0.9, 0.01], dtype=torch.float64)
    assert float(b.weights(nearer)[0] * nearer[0]) > 3 * float(w[0])


@pytest.mark.parametrize("name", ["equal", "upgrad", "graddrop", "modo"])
def test_no_logarithm_by_hand_of_a_negative_loss(name: str) -> None:
    with pytest.raises(InputError, match="the loss of task '2' is -1"):
        make(name, log_losses=True).direction(J, torch.tensor([1.0, 0.0, -1.0, 2.0]))


def test_no_logarithm_of_a_negative_loss() -> None:
    import polytask

    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match="the loss of task 'b' is -2"):
        polytask.backward({"a": x.square().sum(), "b": -x[1]}, balancer=make("upgrad", log_losses=True))
    assert x.grad is None

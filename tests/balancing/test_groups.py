"""Parameters that only some tasks touch: each group is balanced among the tasks that touch it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polytask
from polytask.balancing import GramianWeighting, make
from polytask.errors import InputError, TrainingError

from .conftest import through_json

NAMES = ("a", "b", "c")


class Partly(nn.Module):
    """A trunk for all tasks, a middle part for a and b, a head each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.middle = nn.Linear(4, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleDict({n: nn.Linear(6, 1) for n in NAMES})
        self.double()

    def losses(self, names=NAMES) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (4, 3))
        z = torch.tanh(self.trunk(x))
        m = torch.tanh(self.middle(z))
        outputs = {"a": self.heads["a"](m), "b": self.heads["b"](m), "c": self.heads["c"](z)}
        return {n: ((outputs[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate(NAMES) if n in names}

    def rows(self, part: nn.Module, names) -> torch.Tensor:
        losses = self.losses()
        return torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(losses[n], list(part.parameters()), retain_graph=True)]
                )
                for n in names
            ]
        )


def gradient(part: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in part.parameters()])


class Counting(GramianWeighting):
    """A method with state: how often each task was seen."""

    method = make("equal").method

    def initial_state(self, n_tasks):
        return {"seen": torch.zeros(n_tasks)}

    def solve(self, C, losses):
        self.state["seen"][self.active] += 1
        return self.state["seen"][self.active].double().numpy()


@pytest.mark.parametrize("name", ["upgrad", "mgda", "trimmed_mean"])
def test_reached_by_some_is_balanced_among_them(name) -> None:
    m = Partly()
    losses = torch.stack([v.detach() for v in m.losses().values()])
    seen = polytask.backward(m.losses(), balancer=make(name))
    torch.testing.assert_close(gradient(m.trunk), make(name).direction(m.rows(m.trunk, NAMES), losses))
    torch.testing.assert_close(gradient(m.middle), make(name).direction(m.rows(m.middle, "ab"), losses[:2]))
    assert seen.tasks == NAMES
    assert {key: o.tasks for key, o in seen.groups.items()} == {"a b c": NAMES, "a b": ("a", "b")}
    for n in NAMES:
        torch.testing.assert_close(gradient(m.heads[n]), m.rows(m.heads[n], [n])[0])


def test_one_list_is_one_group() -> None:
    m = Partly()
    together = [*m.trunk.parameters(), *m.middle.parameters()]
    polytask.backward(m.losses(), balancer="mgda", shared=together)
    losses = m.losses()
    J = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(
                        together,
                        torch.autograd.grad(losses[n], together, retain_graph=True, allow_unused=True),
                        strict=True,
                    )
                ]
            )
            for n in NAMES
        ]
    )
    torch.testing.assert_close(torch.cat([gradient(m.trunk), gradient(m.middle)]), make("mgda").direction(J))


def test_named_groups_keep_their_state_whichever_tasks_are_present() -> None:
    m, b = Partly(), Counting()
    b.bind(NAMES)
    groups = {"trunk": m.trunk, "middle": m.middle}
    for names in (NAMES, "ac", "c", "bc"):
        m.zero_grad()
        polytask.backward(m.losses(names), balancer=b, shared=groups)
    assert b.state["seen"].tolist() == [2, 2, 4]
    assert b.branches["middle"].state["seen"].tolist() == [2, 2, 0]
    twin = Counting()
    twin.load_state_dict(through_json(b.state_dict()))
    assert twin.branches["middle"].state["seen"].tolist() == [2, 2, 0]
    m.zero_grad()
    polytask.backward(m.losses(), balancer=b, shared=groups)
    expected = m.middle.weight.grad.clone()
    m.zero_grad()
    polytask.backward(m.losses(), balancer=twin, shared=groups)
    assert torch.equal(m.middle.weight.grad, expected)


def test_weights_kept_between_steps_are_each_groups_own() -> None:
    m, b = Partly(), Counting(every=2)
    for _ in range(4):
        m.zero_grad()
        seen = polytask.backward(m.losses(), balancer=b)
    assert b.state["seen"].tolist() == [2, 2, 2]
    assert b.branches["a b"].state["seen"].tolist() == [2, 2, 0]
    torch.testing.assert_close(gradient(m.middle), 2 * m.rows(m.middle, "ab").sum(0))
    assert seen.groups["a b"].weights.tolist() == [2, 2]


def test_a_mapping_may_balance_every_layer_apart() -> None:
    m = Partly()
    losses = torch.stack([v.detach() for v in m.losses().values()])
    polytask.backward(
        m.losses(), balancer="mgda", shared={"weight": [m.trunk.weight], "bias": [m.trunk.bias], "middle": m.middle}
    )
    J = m.rows(m.trunk, NAMES)
    split = [make("mgda").direction(part, losses) for part in (J[:, :24], J[:, 24:])]
    torch.testing.assert_close(gradient(m.trunk), torch.cat(split))


@pytest.mark.parametrize("policy", ["raise", "skip-task", "skip-step"])
def test_a_gradient_that_is_not_finite_in_one_group_concerns_its_task_everywhere(policy) -> None:
    m = Partly()
    losses = m.losses()
    losses["b"] = losses["b"] + (m.middle.weight.sum() * 0.0).sqrt()
    if policy == "raise":
        with pytest.raises(TrainingError, match="gradient of 'b' is not finite"):
            polytask.backward(losses, balancer="mgda")
    else:
        seen = polytask.backward(losses, balancer="mgda", on_nonfinite=policy)
        assert seen.skipped == ("b",)
    if policy != "skip-task":
        assert all(p.grad is None for p in m.parameters())
        return
    assert m.heads["b"].weight.grad is None
    torch.testing.assert_close(gradient(m.trunk), make("mgda").direction(m.rows(m.trunk, "ac")))
    torch.testing.assert_close(gradient(m.middle), m.rows(m.middle, "a")[0])


def test_groups_that_make_no_sense_are_refused() -> None:
    m = Partly()
    for shared, sentence in (
        ({"x": m.trunk, "y": [m.trunk.weight]}, "listed in the groups 'x' and 'y'"),
        ({"x": m.trunk, "y": nn.Linear(2, 2)}, "shared parameters of the group 'y'"),
    ):
        with pytest.raises(InputError, match=sentence):
            polytask.backward(m.losses(), balancer="mgda", shared=shared)
        assert all(p.grad is None for p in m.parameters())

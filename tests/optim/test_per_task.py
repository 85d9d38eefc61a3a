"""MTAdam and AdaTask against loops written from their formulas, torch's own optimizers, and what is promised of absent tasks and scales."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polytask.balancing import make
from polytask.errors import InputError, TrainingError
from polytask.models import HardSharing
from polytask.optim import AdaTask, MTAdam
from polytask.registry import methods

BOTH = [MTAdam, AdaTask]
RULES = ["adam", "adagrad", "rmsprop"]


def gradients(steps, tasks=3, n=5, seed=0):
    """(steps, tasks, n): rows of sizes 1, 10, 100."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.arange(tasks, dtype=torch.float64)[:, None]
    return sizes * torch.randn(steps, tasks, n, generator=g, dtype=torch.float64)


def run(made, rows, present=None, **options):
    """The trajectory of a parameter whose losses have the given rows as gradients; ``present[t]`` are the tasks of step t."""
    theta = nn.Parameter(torch.ones(rows.shape[-1], dtype=torch.float64))
    optimizer = made([theta])
    optimizer.bind([str(k) for k in range(rows.shape[1])])
    path = []
    for t, step in enumerate(rows):
        optimizer.zero_grad()
        optimizer.backward({str(k): theta @ step[k] for k in (present[t] if present else range(len(step)))}, **options)
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def mtadam_loop(rows, present, lr, betas, eps, p):
    """The formulas, one coordinate vector at a time."""
    b1, b2, b3 = betas
    tasks = rows.shape[1]
    x = torch.ones(rows.shape[-1], dtype=torch.float64)
    m, v = torch.zeros(2, tasks, rows.shape[-1], dtype=torch.float64)
    n, seen = [None] * tasks, [0] * tasks
    path = []
    for t, step in enumerate(rows):
        for i in present[t]:
            length = step[i].norm()
            n[i] = length if n[i] is None else b3 * n[i] + (1 - b3) * length
        anchor = next(n[i] for i in range(tasks) if n[i] is not None)
        numerator, roots = 0.0, []
        for i in present[t]:
            g = p[i] * anchor / n[i] * step[i]
            seen[i] += 1
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            numerator = numerator + m[i] / (1 - b1 ** seen[i])
            roots.append((v[i] / (1 - b2 ** seen[i])).sqrt())
        x = x - lr * numerator / (torch.stack(roots).max(0).values + eps)
        path.append(x)
    return torch.stack(path)


def adatask_loop(rows, present, lr, rule, betas, eps, p):
    b1, b2 = betas
    tasks = rows.shape[1]
    x = torch.ones(rows.shape[-1], dtype=torch.float64)
    m, v = torch.zeros(2, tasks, rows.shape[-1], dtype=torch.float64)
    seen = [0] * tasks
    path = []
    for t, step in enumerate(rows):
        move = 0.0
        for i in present[t]:
            g = step[i]
            seen[i] += 1
            v[i] = v[i] + g**2 if rule == "adagrad" else b2 * v[i] + (1 - b2) * g**2
            if rule == "adam":
                m[i] = b1 * m[i] + (1 - b1) * g
                move = move + p[i] * (m[i] / (1 - b1 ** seen[i])) / ((v[i] / (1 - b2 ** seen[i])).sqrt() + eps)
            else:
                move = move + p[i] * g / (v[i].sqrt() + eps)
        x = x - lr * move
        path.append(x)
    return torch.stack(path)


presences = st.lists(st.sets(st.integers(0, 2), min_size=1).map(sorted), min_size=3, max_size=15)


class TestFormulas:
    @settings(max_examples=25, deadline=None)
    @given(presences, st.integers(0, 2**31), st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
    def test_mtadam_is_its_formula_whoever_is_present(self, present, seed, p):
        rows, betas = gradients(len(present), seed=seed), (0.8, 0.95, 0.7)
        found = run_weighted(lambda ps: MTAdam(ps, lr=0.1, betas=betas, eps=1e-6), rows, present, p)
        torch.testing.assert_close(found, mtadam_loop(rows, present, 0.1, betas, 1e-6, p), rtol=1e-9, atol=1e-11)

    @settings(max_examples=25, deadline=None)
    @given(
        presences, st.integers(0, 2**31), st.sampled_from(RULES), st.lists(st.floats(0.1, 10), min_size=3, max_size=3)
    )
    def test_adatask_is_its_formula_whoever_is_present(self, present, seed, rule, p):
        rows, betas = gradients(len(present), seed=seed), (0.8, 0.95)
        found = run_weighted(lambda ps: AdaTask(ps, lr=0.1, rule=rule, betas=betas, eps=1e-6), rows, present, p)
        torch.testing.assert_close(found, adatask_loop(rows, present, 0.1, rule, betas, 1e-6, p), rtol=1e-9, atol=1e-11)


def run_weighted(made, rows, present, p):
    theta = nn.Parameter(torch.ones(rows.shape[-1], dtype=torch.float64))
    optimizer = made([theta])
    optimizer.bind("012")
    path = []
    for t, here in enumerate(present):
        optimizer.zero_grad()
        optimizer.backward({str(i): theta @ rows[t, i] for i in here}, weights={str(i): p[i] for i in here})
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


class TestOneTask:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (MTAdam, torch.optim.Adam),
            (AdaTask, torch.optim.Adam),
            (lambda ps: AdaTask(ps, lr=1e-2, rule="adagrad", eps=1e-10), lambda ps: torch.optim.Adagrad(ps, lr=1e-2)),
            (
                lambda ps: AdaTask(ps, lr=1e-2, rule="rmsprop", betas=(0.9, 0.99)),
                lambda ps: torch.optim.RMSprop(ps, lr=1e-2, alpha=0.99),
            ),
            (
                lambda ps: MTAdam(ps, lr=1e-2, weight_decay=0.1),
                lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
            ),
            (
                lambda ps: AdaTask(ps, lr=1e-2, weight_decay=0.1),
                lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
            ),
        ],
    )
    def test_it_is_torch_s_optimizer_to_the_bit(self, ours, theirs, dtype):
        models = [network(names="a").to(dtype) for _ in range(2)]
        optimizer, torchs = ours(models[0].parameters()), theirs(models[1].parameters())
        for step in range(20):
            optimizer.zero_grad()
            optimizer.backward(batch_losses(models[0], step, "a"))
            optimizer.step()
            torchs.zero_grad()
            batch_losses(models[1], step, "a")["a"].backward()
            torchs.step()
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
                assert torch.equal(p, q)


class TestScales:
    @pytest.mark.parametrize("made", BOTH)
    @pytest.mark.parametrize("scale", [1e-8, 1e8])
    def test_a_loss_in_other_units_changes_nothing(self, made, scale):
        rows = gradients(30)
        plain = run(lambda ps: made(ps, lr=0.1, eps=0.0), rows)
        for k in range(3):
            factor = torch.ones(3, 1, dtype=torch.float64)
            factor[k] = scale
            torch.testing.assert_close(run(lambda ps: made(ps, lr=0.1, eps=0.0), factor * rows), plain)

    def test_mtadam_gives_all_tasks_the_first_one_s_length(self):
        rows = gradients(1, n=400)[0]
        theta = nn.Parameter(torch.zeros(400, dtype=torch.float64))
        optimizer = MTAdam([theta], betas=(0.0, 0.999, 0.9))
        optimizer.backward([theta @ g for g in rows])
        optimizer.step()
        for task in "012":
            torch.testing.assert_close(optimizer.moment(theta, "m", task).norm(), rows[0].norm())

    def test_a_task_without_gradient_is_no_anchor(self):
        rows = gradients(10)
        rows[:, 0] = 0
        torch.testing.assert_close(
            run(lambda ps: MTAdam(ps, lr=0.1), rows), run(lambda ps: MTAdam(ps, lr=0.1), rows[:, 1:])
        )

    def test_with_adatask_no_task_rules_the_step_sizes_of_another(self):
        rows = gradients(200, tasks=2, n=1).abs()
        rows[:, 1] *= -1e4  # pulls the other way with 100,000 times the force
        adam = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        reference = torch.optim.Adam([adam], lr=0.1)
        for g in rows:
            adam.grad = g.sum(0)
            reference.step()
        balanced = run(lambda ps: AdaTask(ps, lr=0.1), rows)[-1] - 1
        assert float(adam.detach()) > 10
        assert float(balanced.abs()) < 3


class TestAbsence:
    @pytest.mark.parametrize("made", BOTH)
    def test_a_task_never_seen_is_no_task(self, made):
        rows = gradients(12)
        present = [[0, 2]] * 12
        found = run(lambda ps: made(ps, lr=0.1), rows, present)
        torch.testing.assert_close(found, run(lambda ps: made(ps, lr=0.1), rows[:, [0, 2]]), rtol=0, atol=0)

    @pytest.mark.parametrize("made", BOTH)
    def test_the_state_of_an_absent_task_stays(self, made):
        model = network()
        optimizer = made(model.parameters())
        train(model, optimizer, 3)
        kept = copy.deepcopy(optimizer.state_dict()["state"])
        train(model, optimizer, 1, first=3, names="ac")
        own = {id(p): n for n in "abc" for p in model.task_parameters(n)}
        for i, p in enumerate(model.parameters()):
            now = optimizer.state_dict()["state"][i]
            for key, value in kept[i].items():
                if key.endswith(":b"):
                    assert torch.equal(now[key], value)
                elif key.endswith((":a", ":c")):
                    assert not torch.equal(now[key], value)
            tasks = [own[id(p)]] if id(p) in own else list("abc")
            assert now["steps"] == {n: 3 if n == "b" else 4 for n in tasks}


def network(seed=0, names="abc"):
    torch.manual_seed(seed)
    return HardSharing(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), {n: nn.Linear(8, 1) for n in names}).double()


def batch_losses(model, step, names="abc", scales=(1.0, 10.0, 0.1)):
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 4, generator=g, dtype=torch.float64)
    y = torch.randn(16, 3, generator=g, dtype=torch.float64)
    out = model(x.to(next(model.parameters())))
    return {n: scales[i] * ((out[n][:, 0] - y[:, i].to(out[n])) ** 2).mean() for i, n in enumerate("abc") if n in names}


def train(model, optimizer, steps, first=0, names="abc", **options):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        optimizer.backward(batch_losses(model, step, names), **options)
        optimizer.step()


class TestAsAnOptimizer:
    @pytest.mark.parametrize("made", BOTH)
    @pytest.mark.parametrize("balancer", [None, "dwa", "rlw"])
    def test_a_resumed_run_is_the_unbroken_run_to_the_bit(self, made, balancer):
        def parts(seed):
            model = network(seed)
            optimizer = made(model.parameters(), lr=0.01)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            method = make(balancer, seed=5) if balancer else None
            return [part for part in (model, optimizer, scheduler, method) if part is not None]

        def go(parts, steps, first=0):
            for step in range(first, first + steps):
                train(*parts[:2], 1, first=step, **({"balancer": parts[3]} if balancer else {}))
                parts[2].step()

        whole, halves = parts(0), parts(0)
        go(whole, 12)
        go(halves, 5)
        saved = [copy.deepcopy(part.state_dict()) for part in halves]
        again = parts(1)
        for part, state in zip(again, saved, strict=True):
            part.load_state_dict(state)
        go(again, 7, first=5)
        for p, q in zip(again[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(p, q)

    @pytest.mark.parametrize("made", BOTH)
    def test_half_precision_parameters_keep_their_moments_in_single(self, made):
        model = network().to(torch.bfloat16)
        optimizer = made(model.parameters(), lr=0.01)
        train(model, optimizer, 3)
        other = made(model.parameters(), lr=0.01)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p in model.parameters():
            moments = {k: v for k, v in optimizer.state[p].items() if k.startswith(("m:", "v:"))}
            assert all(v.dtype == torch.float32 for v in moments.values())
            assert all(torch.equal(other.state[p][k], v) for k, v in moments.items())

    @pytest.mark.parametrize("made", BOTH)
    def test_raw_gradients_stand_in_grad_and_pieces_are_the_whole(self, made):
        model, other = network(), network()
        whole, pieces = made(model.parameters(), lr=0.01), made(other.parameters(), lr=0.01)
        for step in range(5):
            whole.zero_grad()
            whole.backward(batch_losses(model, step))
            reference = torch.autograd.grad(sum(batch_losses(model, step).values()), list(model.parameters()))
            for p, g in zip(model.parameters(), reference, strict=True):
                torch.testing.assert_close(p.grad, g)
            whole.step()
            pieces.zero_grad()
            for _ in range(2):
                pieces.backward({n: loss / 2 for n, loss in batch_losses(other, step).items()})
            pieces.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)

    @pytest.mark.parametrize("made", BOTH)
    def test_clipping_the_sum_clips_every_task_alike(self, made):
        rows = gradients(1)[0]
        theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = made([theta], lr=0.1)
        optimizer.backward([theta @ g for g in rows])
        norm = torch.nn.utils.clip_grad_norm_([theta], 1.0)
        torch.testing.assert_close(norm, rows.sum(0).norm())
        optimizer.step()
        expected = rows / norm if made is AdaTask else rows / rows.norm(dim=1, keepdim=True) * rows[0].norm() / norm
        for k, g in enumerate(expected):
            torch.testing.assert_close(optimizer.moment(theta, "m", str(k)), 0.1 * g, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("made", BOTH)
    def test_gradient_scaler_changes_nothing_and_an_overflow_skips_the_step(self, made):
        model, other = network(), network()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        optimizer, plain = made(model.parameters(), lr=0.01), made(other.parameters(), lr=0.01)

        def scaled(step, factor=1.0):
            optimizer.zero_grad()
            losses = batch_losses(model, step)
            optimizer.backward({**losses, "b": losses["b"] * factor}, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()

        for step in range(3):
            scaled(step)
        train(other, plain, 3)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        scaled(3, float("inf"))
        assert all(torch.equal(v, before[0][n]) for n, v in model.state_dict().items())
        assert before[1][0]["steps"] == optimizer.state_dict()["state"][0]["steps"]

    @pytest.mark.parametrize("made", BOTH)
    def test_it_learns_tasks_of_very_different_scales(self, made):
        def gain(optimizer_of, tell):
            model = network()
            optimizer = optimizer_of(model.parameters())
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            y = torch.tanh(x @ torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
            for _ in range(150):
                out = model(x)
                errors = {n: ((out[n][:, 0] - y[:, i]) ** 2).mean() for i, n in enumerate("abc")}
                optimizer.zero_grad()
                tell(optimizer, {n: c * errors[n] for n, c in zip("abc", (1.0, 1e3, 1e-3), strict=True)})
                optimizer.step()
            return float(errors["c"].detach())

        own = gain(lambda ps: made(ps, lr=0.01), lambda o, losses: o.backward(losses))
        adam = gain(lambda ps: torch.optim.Adam(ps, lr=0.01), lambda o, losses: sum(losses.values()).backward())
        assert own < 0.7 * adam  # heads alone are Adam's in both


class TestRefusals:
    @pytest.mark.parametrize("made", BOTH)
    def test_step_without_backward(self, made):
        theta = nn.Parameter(torch.ones(2))
        theta.sum().backward()
        with pytest.raises(InputError, match="in place of"):
            made([theta]).step()

    @pytest.mark.parametrize("made", BOTH)
    def test_a_balancer_of_gradients(self, made):
        model = network()
        with pytest.raises(InputError, match="balances the gradients itself"):
            made(model.parameters()).backward(batch_losses(model, 0), balancer="mgda")

    @pytest.mark.parametrize("made", BOTH)
    @pytest.mark.parametrize(("value", "what"), [(float("nan"), "loss"), (None, "gradient")])
    def test_what_is_not_finite_is_named_and_nothing_is_touched(self, made, value, what):
        model = network()
        losses = batch_losses(model, 0)
        if value is None:  # finite itself, its slope is not
            root = next(model.task_parameters("b")).flatten()[0]
            losses["b"] = losses["b"] + (root - root.detach()).abs().sqrt()
        else:
            losses["b"] = losses["b"] * value
        with pytest.raises(TrainingError, match=f"{what} of task 'b'"):
            made(model.parameters()).backward(losses)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("made", BOTH)
    def test_tensors_without_entries_and_losses_without_parameters_of_ours(self, made):
        empty, full = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2))
        stranger = nn.Parameter(torch.ones(2))
        optimizer = made([empty, full], lr=0.5)
        optimizer.backward({"a": empty.sum() + full.sum(), "b": stranger.sum()})
        optimizer.step()
        torch.testing.assert_close(full.detach(), torch.full((2,), 0.5))
        assert stranger.grad is None

    @pytest.mark.parametrize("made", BOTH)
    def test_losses_that_are_none(self, made):
        optimizer = made(network().parameters())
        with pytest.raises(InputError, match="'a' has no graph"):
            optimizer.backward({"a": torch.tensor(1.0)})
        with pytest.raises(InputError, match="scalar"):
            optimizer.backward({"a": torch.ones(2, requires_grad=True)})

    @pytest.mark.parametrize("made", BOTH)
    def test_states_of_others(self, made):
        model = network()
        optimizer = made(model.parameters())
        with pytest.raises(InputError, match="not saved by"):
            optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
        optimizer.bind("abc")
        other = made(model.parameters())
        other.bind("ab")
        with pytest.raises(InputError, match="for the tasks a, b, c, not a, b"):
            other.load_state_dict(optimizer.state_dict())

    @pytest.mark.parametrize(
        ("made", "option", "value"),
        [
            (MTAdam, "betas", (0.9, 0.999)),
            (MTAdam, "lr", -1.0),
            (AdaTask, "rule", "sgd"),
            (AdaTask, "betas", (0.9, 1.0)),
            (AdaTask, "eps", -1.0),
            (AdaTask, "weight_decay", float("inf")),
        ],
    )
    def test_options_by_name(self, made, option, value):
        with pytest.raises(InputError, match=option):
            made([nn.Parameter(torch.ones(1))], **{option: value})


def test_the_registry_knows_the_family():
    assert {"adatask", "dualoptim_plus", "madam", "mtadam"} <= {m.name for m in methods("optim")}

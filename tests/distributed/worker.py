"""What each process of the distributed tests does; its findings go to a file, the test reads those of all processes."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import polytask
from polytask.balancing import LossWeighting, make
from polytask.balancing.looks import looks_again
from polytask.models import HardSharing
from polytask.registry import Method, methods

NAMES = ("a", "b", "c")
# task c has labels on the first process only; a and b are labelled unevenly
ROWS = (7, 3, 5, 4)
LABELLED = {"a": (7, 2, 5, 1), "b": (3, 3, 1, 4), "c": (6, 0, 0, 0)}


class Forward(nn.Module):
    """What a distributed wrapper may be put around: inputs -> the losses' ingredients."""

    def __init__(self, model: HardSharing) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.model(x)
        return outputs


def model(deep: bool) -> HardSharing:
    torch.manual_seed(0)
    heads = {n: nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)) if deep else nn.Linear(5, 1) for n in NAMES}
    return HardSharing(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), heads).double()


def batch(step: int, rank: int | None, world: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows of one process, or of all of them one after another, and which are labelled."""
    inputs, targets, labelled = [], [], {n: [] for n in NAMES}
    for r in range(world):
        generator = torch.Generator().manual_seed(1000 * step + r)
        inputs.append(torch.randn(ROWS[r], 4, generator=generator, dtype=torch.float64))
        targets.append(torch.randn(ROWS[r], 3, generator=generator, dtype=torch.float64))
        for n in NAMES:
            labelled[n].append(torch.arange(ROWS[r]) < LABELLED[n][r])
    chosen = range(world) if rank is None else [rank]
    return (
        torch.cat([inputs[r] for r in chosen]),
        torch.cat([targets[r] for r in chosen]),
        {n: torch.cat([labelled[n][r] for r in chosen]) for n in NAMES},
    )


def losses_of(outputs: dict[str, Tensor], y: Tensor, labelled: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared errors + 1/2 over labelled rows; zero, with graph, without any."""
    found = {}
    for i, n in enumerate(NAMES):
        rows = labelled[n]
        error = (outputs[n][:, 0] - y[:, i])[rows] ** 2
        found[n] = error.mean() + 0.5 if bool(rows.any()) else outputs[n].sum() * 0.0
    return found


def balanced(method: Method, **options: Any) -> Any:
    return make(method.name, **{**method.example, **options})


def train(
    method: Method, level: str, steps: int, rank: int | None, world: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A few steps of gradient descent; the parameters at the end and the gradient of each of the first steps."""
    module = Forward(model(deep=level == "copies"))
    wrapped: Any = module
    if rank is not None and level != "exact":
        wrapped = DistributedDataParallel(module)
    balancer = balanced(method, seed=0 if rank is None else rank)
    gradients = []
    for step in range(steps):
        if step % 10 == 0:
            balancer.begin_epoch()
        x, y, labelled = batch(step, rank, world)
        module.zero_grad()
        if looks_again(balancer):
            look(module, balancer, step, rank, world)
            if step < 3:
                gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
            descend(module)
            continue
        losses = losses_of(wrapped(x), y, labelled)
        counts = {n: rows.sum() for n, rows in labelled.items()}
        features = None if level == "exact" else module.model.features
        polytask.backward(
            losses,
            shared=module.model.trunk,
            balancer=balancer,
            features=features,
            level="auto" if features else "exact",
            counts=counts,
            group=None if rank is None else "world",
        )
        if step < 3:
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        descend(module)
        if balancer.needs_second_evaluation:
            with torch.no_grad():
                balancer.after_step(losses_of(module(x), y, labelled), counts)
    return module.state_dict(), gradients


def look(module: Forward, balancer: Any, step: int, rank: int | None, world: int) -> None:
    """The gradients of a method that looks again, at batches of its own."""
    polytask.backward_batches(
        lambda rows: losses_of(module(rows[0]), rows[1], rows[2]),
        [batch(1000 * i + step, rank, world) for i in range(len(balancer.roles))],
        shared=module.model.trunk,
        balancer=balancer,
        counts=lambda rows: {n: its.sum() for n, its in rows[2].items()},
        group=None if rank is None else "world",
    )


def descend(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p -= 0.02 * p.grad / max(1.0, float(p.grad.norm()))


def every_method(rank: int, world: int) -> dict[str, Any]:
    """A hundred steps of every method at one level, a few at the others; fewer between more processes than a test machine has cores."""
    found = {}
    many = 100 if world == 2 or "POLYTASK_LONG" in os.environ else 20
    for method in methods("balancing"):
        levels = ["linear", "exact", "copies"]
        if looks_again(balanced(method)):
            levels = ["exact"]
        elif issubclass(method.factory, LossWeighting):
            levels = ["linear"]
        elif coordinates_of_parameters(method):
            levels = ["exact"]
        for level in levels if world == 2 else levels[:2]:
            long = level == levels[0]
            steps = 20 if looks_again(balanced(method)) else many
            found[method.name, level] = train(method, level, steps if long else 3, rank, world)
    return found


def coordinates_of_parameters(method: Method) -> bool:
    """Whether the method remembers gradients by coordinate, which at a representation are other examples in every step."""
    b = balanced(method)
    b.bind(NAMES)
    return any(value is None for value in b.state.values())


def volume(rank: int, world: int) -> dict[str, Any]:
    """Bytes that enter each kind of collective in one step, by level."""
    found: dict[str, Any] = {}
    for level in ("exact", "linear"):
        sent: dict[str, int] = {}
        with Counting(sent):
            x, y, labelled = batch(0, rank, world)
            m = model(deep=False)
            balancer = make("upgrad")
            for _ in range(2):  # the first step also agrees on state
                sent.clear()
                losses = losses_of(m(x), y, labelled)
                counts = {n: rows.sum() for n, rows in labelled.items()}
                features = m.features if level == "linear" else None
                polytask.backward(losses, shared=m.trunk, balancer=balancer, features=features, counts=counts)
        found[level] = sent
    found["P"] = sum(p.numel() for p in m.trunk.parameters())
    found["own"] = sum(p.numel() for n in NAMES for p in m.task_parameters(n))
    return found


class Counting:
    """Counts the bytes given to torch.distributed's collectives."""

    NAMES = (
        "all_reduce",
        "broadcast",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "all_gather_single",
        "all_gather_into_tensor",
        "all_gather_object",
    )

    def __init__(self, sent: dict[str, int]) -> None:
        self.sent = sent
        self.originals: dict[str, Any] = {}

    def __enter__(self) -> None:
        for name in self.NAMES:
            original = getattr(dist, name, None)
            if original is not None:
                self.originals[name] = original
                setattr(dist, name, self.counting(name, original))

    def counting(self, name: str, original: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            given = arguments[-1] if len(arguments) > 1 else arguments[0]
            self.sent[name] = self.sent.get(name, 0) + (given.nbytes if isinstance(given, Tensor) else 1)
            return original(*arguments, **options)

        return counted

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def sharded(rank: int, world: int) -> dict[str, Any]:
    """Three steps with parameters sharded by fully_shard, at the levels that leave averaging to it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for name, deep in (("uncertainty", True), ("upgrad", True), ("upgrad", False), ("graddrop", True)):
        module = Forward(model(deep))
        fully_shard(module, mesh=mesh)
        balancer, gradients = make(name), []
        for step in range(3):
            x, y, labelled = batch(step, rank, world)
            module.zero_grad()
            losses = losses_of(module(x), y, labelled)
            counts = {n: rows.sum() for n, rows in labelled.items()}
            polytask.backward(losses, balancer=balancer, features=module.model.features, counts=counts)
            gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in module.parameters()]))
            with torch.no_grad():
                for p, g in zip(
                    module.parameters(), gradients[-1].split([p.numel() for p in module.parameters()]), strict=True
                ):
                    whole = p.full_tensor() - 0.02 * g.view(p.shape) / max(1.0, float(g.norm()))
                    p.copy_(torch.distributed.tensor.distribute_tensor(whole, mesh, p.placements))
        found[name, deep] = gradients
    return found


def refusals(rank: int, world: int) -> dict[str, str]:
    """What is said where processes disagree; each must be said by all of them, or the others would wait for ever."""
    found = {}
    x, y, labelled = batch(0, rank, world)

    def said(name: str, **options: Any) -> None:
        m = model(deep=False)
        losses = losses_of(m(x), y, labelled)
        if name == "missing" and rank == 1:
            del losses["b"]
        if name == "unknown" and rank == 1:
            losses["z"] = losses.pop("b")
        if name == "nan" and rank == 1:
            losses["a"] = losses["a"] * float("nan")
        try:
            seen = polytask.backward(losses, balancer=make("mgda"), shared=m.trunk, level="exact", **options)
            found[name, str(options)] = f"{seen.tasks} {seen.skipped} {seen.taken}"
        except polytask.PolytaskError as error:
            found[name, str(options)] = str(error)

    said("missing")
    said("unknown")
    said("nan")
    said("nan", on_nonfinite="skip-task")
    said("nan", on_nonfinite="skip-step")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    scene, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        found = {"every_method": every_method, "volume": volume, "sharded": sharded, "refusals": refusals}[scene](
            rank, world
        )
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()

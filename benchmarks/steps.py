"""Cost of one training step of every balancing method, as ratios to a plain sum-of-losses step of the same model in the same run.

    python benchmarks/steps.py [--tasks 3 10 40] [--trunks mlp conv transformer] [--methods equal famo ...] [--rounds 15] [--json]

A step is forward, losses, backward and optimizer step. Methods and the plain step take turns within each round, and
each figure is the median over rounds of that round's own ratio, so that a slow moment of the machine touches both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn

import polytask
from polytask.balancing import Balancer, GradientAggregator, LossWeighting, make
from polytask.models import HardSharing
from polytask.registry import methods


def trunk(name: str) -> tuple[nn.Module, Tensor, int]:
    if name == "mlp":
        layers: list[nn.Module] = []
        for size in (64, 512, 512):
            layers += [nn.Linear(size, 512), nn.ReLU()]
        return nn.Sequential(*layers), torch.randn(256, 64), 512
    if name == "conv":
        blocks: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 64)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(32, 3, 32, 32), 64
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2), _MeanToken()), torch.randn(32, 32, 128), 128
    raise SystemExit(f"unknown trunk {name!r}")


class _MeanToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


class Step:
    """One model with one way of turning its losses into gradients."""

    def __init__(self, trunk_name: str, n_tasks: int, balancer: Balancer | None, level: str = "auto") -> None:
        torch.manual_seed(0)
        body, self.inputs, width = trunk(trunk_name)
        self.model = HardSharing(body, {f"t{i}": nn.Linear(width, 1) for i in range(n_tasks)})
        self.targets = torch.randn(len(self.inputs), n_tasks)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.balancer, self.level = balancer, level

    def losses(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: ((outputs[n][:, 0] - self.targets[:, i]) ** 2).mean() for i, n in enumerate(outputs)}

    def __call__(self) -> float:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        if self.balancer is None:
            z = self.model.trunk(self.inputs)  # the plain step knows nothing of polytask
            torch.stack(
                list(self.losses({f"t{i}": h(z) for i, h in enumerate(self.model.heads)}).values())
            ).sum().backward()
        else:
            losses = self.losses(self.model(self.inputs))
            features = None if self.level == "exact" else self.model.features
            polytask.backward(
                losses, shared=self.model.trunk, balancer=self.balancer, features=features, level=self.level
            )
        self.optimizer.step()
        if self.balancer is not None and self.balancer.needs_second_evaluation:
            with torch.no_grad():
                self.balancer.after_step(self.losses(self.model(self.inputs)))
        return time.perf_counter() - started


def build(name: str) -> Balancer:
    """A method with its defaults; ``famo:one look`` is FAMO on the next step's losses instead of a second forward pass."""
    return make("famo", second_look=False) if name == "famo:one look" else make(name)


def ratios(trunk_name: str, n_tasks: int, names: list[str], rounds: int, exact: bool) -> dict[str, float]:
    level = "exact" if exact else "auto"
    steps = {n: Step(trunk_name, n_tasks, build(n), level) for n in names}
    plain = Step(trunk_name, n_tasks, None)
    found: dict[str, list[float]] = {n: [] for n in names}
    for step in (plain, *steps.values()):
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            mine, reference = [], []
            for _ in range(5):
                reference.append(plain())
                mine.append(step())
            found[name].append(min(mine) / min(reference))
    return {n: statistics.median(r) for n, r in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 10, 40])
    parser.add_argument("--trunks", nargs="+", default=["mlp", "conv", "transformer"])
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--exact", action="store_true", help="gradients at the parameters instead of the representation"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.methods or [*(m.name for m in methods("balancing") if not m.example), "famo:one look"]
    rows = {(t, k): ratios(t, k, names, options.rounds, options.exact) for t in options.trunks for k in options.tasks}
    if options.json:
        print(json.dumps([{"trunk": t, "tasks": k, **r} for (t, k), r in rows.items()]))
        return
    print("ratio to a plain step".ljust(32) + "".join(f"{t[:6]} K={k:<3d}".rjust(13) for t, k in rows))
    for name in names:
        kind = build(name)
        level = (
            "values"
            if isinstance(kind, LossWeighting)
            else "jacobian"
            if isinstance(kind, GradientAggregator)
            else "gramian"
        )
        print(f"{name:<20}{level:<12}" + "".join(f"{r[name]:13.3f}" for r in rows.values()))


if __name__ == "__main__":
    main()

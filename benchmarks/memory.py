"""Peak memory of one training step at every level, as ratios to a plain step, each in a process of its own.

    python benchmarks/memory.py [--tasks 3 40] [--layers 8] [--width 2048] [--examples 32]

The trunk is an MLP whose parameters outweigh its activations, the case in which a K x P Jacobian hurts most. Figures are the growth of the
resident set from before the model is built to its peak.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

LEVELS = ("plain", "values", "representation", "exact")


def step(level: str, n_tasks: int, layers: int, width: int, examples: int) -> float:
    """Peak growth of the resident set over two steps, in MiB."""
    import torch
    from torch import nn

    import polytask
    from polytask.balancing import make
    from polytask.models import HardSharing

    torch.set_num_threads(1)
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    model = HardSharing(nn.Sequential(*blocks), {f"t{k}": nn.Linear(width, 1) for k in range(n_tasks)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    balancer = make("equal" if level in ("plain", "values") else "upgrad")
    x = torch.randn(examples, width)
    for _ in range(2):
        optimizer.zero_grad()
        losses = {n: ((o - k) ** 2).mean() for k, (n, o) in enumerate(model(x).items())}
        if level == "plain":
            torch.stack(list(losses.values())).sum().backward()
        else:
            features = None if level == "exact" else model.features
            polytask.backward(losses, shared=model.trunk, balancer=balancer, features=features)
        optimizer.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 40])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--one", choices=LEVELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(step(options.one, options.tasks[0], options.layers, options.width, options.examples))
        return
    parameters = options.layers * options.width**2
    print(f"trunk of {parameters / 1e6:.0f} M parameters, {options.examples} examples; peak MiB (ratio to plain)")
    for n_tasks in options.tasks:
        found = {}
        for level in LEVELS:
            shape = [
                "--layers",
                str(options.layers),
                "--width",
                str(options.width),
                "--examples",
                str(options.examples),
            ]
            command = [sys.executable, __file__, "--one", level, "--tasks", str(n_tasks), *shape]
            found[level] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = "".join(f"  {level} {m:.0f} ({m / found['plain']:.2f})" for level, m in found.items())
        print(f"K={n_tasks:<3d}{row}   K x P would add {n_tasks * parameters * 4 / 2**20:.0f}")


if __name__ == "__main__":
    main()

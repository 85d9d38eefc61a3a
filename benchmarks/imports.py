"""What starting costs: ``import polytask`` beside ``import torch``, and ``polytask --help`` beside an empty interpreter.

Every figure is a median over processes started in turn, so that what else the machine does falls on all of them alike.

    python benchmarks/imports.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "python": "pass",
    "torch": "import torch",
    "torch and polytask": "import torch, polytask",
    "torch and polytask.backward": "import torch, polytask; polytask.backward",
    "polytask alone": "import polytask",
    "polytask --help": "import sys; sys.argv = ['polytask', '--help']; from polytask.cli import main; main()",
    "polytask fit --help": "import sys; sys.argv = ['polytask', 'fit', '--help']; from polytask.cli import main; main()",
}


def seconds(program: str) -> float:
    """The wall time of one process that runs the program."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Print the medians and the figures that are aimed at."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    for program in PROGRAMS.values():  # byte code and file caches, once
        seconds(program)
    rounds = [{name: seconds(program) for name, program in PROGRAMS.items()} for _ in range(repeats)]
    for name in PROGRAMS:
        print(f"{name:30} {statistics.median(r[name] for r in rounds):6.3f} s")
    for name in ("torch and polytask", "torch and polytask.backward"):
        beyond = statistics.median(r[name] - r["torch"] for r in rounds)
        print(f"{name} beyond torch: {beyond:+.3f} s (aim: at most 0.150 s)")
    print(f"polytask --help: {statistics.median(r['polytask --help'] for r in rounds):.3f} s (aim: at most 0.500 s)")


if __name__ == "__main__":
    main()

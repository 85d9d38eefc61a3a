"""When learning how to merge without labels helps, and when it harms: by entropy and by labels, on few inputs and on many.

    python benchmarks/experts.py experts --model vit
    python benchmarks/adaptive.py experts/vit/compare.yml --tasks mnist spoken_digit speaker katakana

Every row gives means over the tasks on test rows: what share of the experts' accuracy is kept, entropy and cross-entropy of the answers,
and the share of the most frequent answer. Methods take 125 steps at four times their rate: as far as their own 500 reach, for a quarter
of the time. What they learn from are validation rows. Written to ``benchmarks/results/adaptive.json``, under the file's name and the number
of tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from polytask.merging import adapt, merge
from polytask.training.data import TaskData
from polytask.training.merges import Lineage, MergeTask, read_comparison

RESULTS = Path(__file__).with_name("results") / "adaptive.json"
FEW, MANY = 32, 400
FAST = {"steps": 125, "learning_rate": 4e-3}
SCALES = (0.05, 0.1, 0.2, 0.3, 0.5)
FAR = {"start": 0.0, "stride": 1.0, "wise": "layer", "steps": 50}
KEYS = ("normalised", "entropy", "cross_entropy", "most_frequent")

State = Mapping[str, Tensor]


@torch.no_grad()
def logits(line: Lineage, task: str, state: State, rows: TaskData) -> Tensor:
    model, found = line.model(task, state).eval(), []
    for part in torch.arange(len(rows)).split(256):
        x = rows.rows(part).inputs
        out = model(**x) if isinstance(x, dict) else model(x)
        found.append(getattr(out, "logits", out))
    return torch.cat(found)


def judged(line: Lineage, tasks: Sequence[MergeTask], state: State, reached: Mapping[str, float]) -> dict[str, float]:
    rows = []
    for t in tasks:
        z, y = logits(line, t.name, state, t.test), t.test.targets[t.name]
        log_p, answers = z.log_softmax(-1), z.argmax(-1)
        kept = (answers == y).double().mean() / reached[t.name]
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        rows.append([float(v) for v in (kept, entropy, cross_entropy(z, y), torch.bincount(answers).max() / len(y))])
    return dict(zip(KEYS, np.mean(rows, 0).round(4).tolist(), strict=True))


def batches(tasks: Sequence[MergeTask], count: int, labels: bool) -> dict[str, list[Any]]:
    found = {}
    for t in tasks:
        cut = [t.validation.rows(part) for part in torch.arange(min(count, len(t.validation))).split(16)]
        found[t.name] = [(b.inputs, b.targets[t.name]) if labels else b.inputs for b in cut]
    return found


def study(file: Path, only: Sequence[str], seed: int) -> list[dict[str, Any]]:
    said = read_comparison(file, methods=["average"], seeds=[seed])
    tasks = [t for t in said.tasks if not only or t.name in only]
    line = said.lineage(seed)
    line.experts = {t.name: line.experts[t.name] for t in tasks}

    def right(state: State, t: MergeTask, rows: TaskData) -> float:
        return float((logits(line, t.name, state, rows).argmax(-1) == rows.targets[t.name]).double().mean())

    reached = {t.name: right(line.experts[t.name], t, t.test) for t in tasks}
    rows: list[dict[str, Any]] = []

    def note(name: str, state: State, learned_from: str = "") -> None:
        rows.append({"name": name, "learned_from": learned_from, **judged(line, tasks, state, reached)})
        print(rows[-1], flush=True)

    def learned(name: str, method: str, count: int, *, labels: bool = False, **options: Any) -> None:
        first = tasks[0].name
        model = line.build(first, line.experts[first])
        data = batches(tasks, count, labels)
        state = adapt(
            model, line.base, line.experts, data, method, skip=line.head, check=False, labels=labels, **options
        )
        note(name, state, f"{count} {'labelled rows' if labels else 'inputs'}")

    added = {s: merge(line.base, line.experts, "task_arithmetic", scale=s, skip=line.head) for s in SCALES}
    best = max(SCALES, key=lambda s: np.mean([right(added[s], t, t.validation) for t in tasks]))
    note("base", line.base)
    for s in dict.fromkeys((best, 0.3)):
        note(f"task arithmetic, {s}" + ", chosen on validation" * (s == best), added[s])
    for start in dict.fromkeys((0.3, best)):
        learned(f"AdaMerging from {start}", "adamerging", FEW, start=start, **FAST)
        learned(f"AdaMerging from {start}", "adamerging", MANY, start=start, **FAST)
    learned(f"AdaMerging from {best}", "adamerging", MANY, labels=True, start=best, **FAST)
    learned("AdaRank", "adarank", MANY, **FAST)
    learned("AdaRank", "adarank", MANY, labels=True, **FAST)
    learned(f"Frank-Wolfe from {best}", "frank_wolfe", 128, labels=True, start=best)
    learned("Frank-Wolfe from the base, whole strides", "frank_wolfe", FEW, **FAR)
    learned("Frank-Wolfe from the base, whole strides", "frank_wolfe", FEW, labels=True, **FAR)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = study(options.file, options.tasks, options.seed)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    name = f"{options.file.resolve().parent.name}_{len(options.tasks) or 'all'}"
    kept[name] = {"tasks": options.tasks, "seed": options.seed, "rows": rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Adult census: one joint model of income and marital status against its two single-task references and against gradient boosting.

    python benchmarks/adult.py [--seeds 3] [--data ../shared/data/adult/adult.data.gz] [--json]

Every model sees the same features (all columns but the two targets) and the same test rows (a fifth, stratified). The networks
train on seven tenths and stop on one tenth; HistGradientBoosting gets both parts and holds out the same share of them itself. Joint
and single-task networks have the same settings and the same rule for stopping; seconds are those until the epoch whose weights were
kept, and until training stopped, each by the wall clock and of the processor (which a busy machine does not stretch). One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import accuracy_score, roc_auc_score
from threadpoolctl import threadpool_limits

from polytask.data import TableEncoder, encode_targets, infer_tasks, split_rows
from polytask.models.tabular import tabular_model
from polytask.tasks import Tasks
from polytask.training import Progress, TaskData, TrainConfig, predict_outputs, train

COLUMNS = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
]
TARGETS = ["income", "marital_status"]
FRACTIONS = (0.7, 0.1, 0.2)
CONFIG = TrainConfig(epochs=60, batch_size=512, learning_rate=2e-3, patience=5, device="cpu")


def measures(name: str, y: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """AUC of income; of marital status one-versus-rest AUC (mean over classes, and weighted by their size) and accuracy."""
    if probability.ndim == 1:
        return {f"{name} AUC": roc_auc_score(y, probability)}
    each = np.array([roc_auc_score(y == c, probability[:, c]) for c in range(probability.shape[1])])
    share = np.bincount(y, minlength=len(each)) / len(y)
    return {
        f"{name} macro AUC": float(each.mean()),
        f"{name} weighted AUC": float(share @ each),
        f"{name} accuracy": accuracy_score(y, probability.argmax(1)),
    }


class Clock:
    """Wall and processor seconds at the end of every epoch."""

    def __init__(self) -> None:
        self.began = (time.perf_counter(), time.process_time())
        self.at: dict[int, tuple[float, float]] = {}

    def __call__(self, progress: Progress) -> None:
        now = (time.perf_counter(), time.process_time())
        self.at.setdefault(progress.epoch, (now[0] - self.began[0], now[1] - self.began[1]))

    def read(self, best_epoch: int) -> dict[str, float]:
        (wall, cpu), (wall_all, cpu_all) = self.at[best_epoch], self.at[max(self.at)]
        return {"wall": wall, "cpu": cpu, "wall to stop": wall_all, "cpu to stop": cpu_all, "epochs": best_epoch}


def network(
    spec: dict[str, Any], tasks: Tasks, parts: list[TaskData], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Train on some of the tasks; the measures on the test part, and the seconds it took."""
    model = tabular_model(spec, tasks, seed=seed)
    clock = Clock()
    result = train(model, tasks, parts[0], parts[1], config=CONFIG.but(seed=seed), progress=clock)
    outputs = predict_outputs(model, tasks, parts[2].inputs)
    found: dict[str, float] = {}
    for name in tasks:
        found |= measures(name, parts[2].targets[name].numpy(), outputs[name]["probability"])
    return found, clock.read(result.best_epoch)


def boosting(
    frame: pd.DataFrame, labels: dict[str, np.ndarray], known: np.ndarray, test: np.ndarray, seed: int
) -> dict[str, float]:
    X = frame.drop(columns=TARGETS)
    texts = [c for c in X.columns if not pd.api.types.is_numeric_dtype(X[c].dtype)]
    X = X.astype(dict.fromkeys(texts, "category"))
    held = FRACTIONS[1] / (FRACTIONS[0] + FRACTIONS[1])
    found: dict[str, float] = {}
    for name in TARGETS:
        model = HistGradientBoostingClassifier(
            categorical_features="from_dtype", early_stopping=True, validation_fraction=held, random_state=seed
        )
        p = model.fit(X.iloc[known], labels[name][known]).predict_proba(X.iloc[test])
        found |= measures(name, labels[name][test], p[:, 1] if p.shape[1] == 2 else p)
    return found


def one_seed(frame: pd.DataFrame, seed: int) -> dict[str, Any]:
    tasks = infer_tasks(frame, TARGETS)
    labels = encode_targets(frame, tasks)
    split = split_rows(frame, tasks, seed=seed, fractions=FRACTIONS)
    X = frame.drop(columns=TARGETS)
    encoder = TableEncoder().fit(X.iloc[split.train])
    whole = TaskData(encoder.transform(X).tensors(), {n: torch.from_numpy(y) for n, y in labels.items()})
    parts = [whole.rows(torch.from_numpy(rows)) for rows in (split.train, split.validation, split.test)]
    known = np.concatenate([split.train, split.validation])
    joint, joint_time = network(encoder.spec, tasks, parts, seed)
    single: dict[str, float] = {}
    single_times = []
    for name in TARGETS:
        scores, seconds = network(encoder.spec, tasks.only([name]), parts, seed)
        single |= scores
        single_times.append(seconds)
    return {
        "scores": {
            "joint": joint,
            "single-task": single,
            "boosting": boosting(frame, labels, known, split.test, seed),
        },
        "seconds": {"joint": joint_time, "single-task": {k: sum(s[k] for s in single_times) for k in joint_time}},
    }


def show(runs: list[dict[str, Any]]) -> None:
    def mean(*keys: str) -> float:
        values = []
        for run in runs:
            value: Any = run
            for key in keys:
                value = value[key]
            values.append(float(value))
        return statistics.fmean(values)

    kinds = ("joint", "single-task", "boosting")
    print(
        f"{'test set, mean of ' + str(len(runs)) + ' seeds':<32}{''.join(k.rjust(13) for k in kinds)}{'joint - boosting':>18}"
    )
    for measure in runs[0]["scores"]["joint"]:
        row = [mean("scores", kind, measure) for kind in kinds]
        print(f"{measure:<32}{''.join(f'{v:13.4f}' for v in row)}{row[0] - row[2]:+18.4f}")
    print(f"\n{'seconds, mean':<32}{'joint':>13}{'single-task':>13}{'ratio':>13}")
    labels = {
        "wall": "wall, to validation optimum",
        "cpu": "processor, to optimum",
        "wall to stop": "wall, until stopped",
        "cpu to stop": "processor, until stopped",
        "epochs": "epochs to optimum (both added)",
    }
    for key, label in labels.items():
        a, b = mean("seconds", "joint", key), mean("seconds", "single-task", key)
        print(f"{label:<32}{a:13.1f}{b:13.1f}{a / b:13.2f}")


def main() -> None:
    shared = Path(os.environ.get("POLYTASK_SHARED", Path(__file__).parents[1] / "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=shared / "data" / "adult" / "adult.data.gz")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    frame = pd.read_csv(options.data, names=COLUMNS, skipinitialspace=True, na_values="?")
    with threadpool_limits(1):
        runs = [one_seed(frame, seed) for seed in range(options.seeds)]
    if options.json:
        print(json.dumps(runs))
    else:
        show(runs)


if __name__ == "__main__":
    main()

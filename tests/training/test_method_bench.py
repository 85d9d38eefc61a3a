"""The benchmark of methods: what is chosen on which rows, what survives a kill, who is left out and why."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytask.errors import InputError, TrainingError
from polytask.training import jobs, method_bench
from polytask.training.comparison import compare
from polytask.training.image_pairs import ImagePairs
from polytask.training.jobs import StudyProgress, Workshop
from polytask.training.judging import Bench
from polytask.training.method_bench import bench_pairs, contenders
from polytask.training.method_search import learning_rates

from .study_cases import without_seconds
from .test_study_plan import TASKS, decoded, labels

spec = importlib.util.spec_from_file_location("bench_data", Path(__file__).parents[1] / "cli/bench_data.py")
assert spec is not None
assert spec.loader is not None
bench_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_data)

TINY: dict[str, Any] = {"rows": 120, "seeds": 2, "epochs": 2, "trials": 2, "workers": 1, "names": ["mgda", "famo"]}


class Killed(BaseException):
    """What a kill is to the code that runs."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    images = bench_data.image_folder(folder / "bars")
    return images, bench_pairs(images, out=folder / "run", **TINY)


def test_trials_of_the_learning_rate_spread_from_the_middle() -> None:
    assert learning_rates(5) == pytest.approx([1, 10**-0.5, 10**0.5, 0.1, 10])
    assert learning_rates(1) == [1.0]


@pytest.mark.parametrize("after", [1, 9, 17])
def test_killed_anywhere_and_resumed_it_comes_to_the_same(whole: Any, tmp_path: Path, after: int) -> None:
    images, expected = whole

    def kill(progress: StudyProgress) -> None:
        if progress.done >= after:
            raise Killed

    with pytest.raises(Killed):
        bench_pairs(images, out=tmp_path / "run", progress=kill, **TINY)
    assert not (tmp_path / "run/results.json").exists()
    trained = {p.parent for p in (tmp_path / "run/work").glob(f"*/{jobs.OUTCOME}")}
    stamps = {p: (p / jobs.OUTCOME).stat().st_mtime_ns for p in trained}
    found: list[int] = []

    def look(_: StudyProgress) -> None:
        found.append(sum((p / jobs.OUTCOME).stat().st_mtime_ns == t for p, t in stamps.items() if p.exists()))

    again = bench_pairs(images, out=tmp_path / "run", resume=True, progress=look, **{**TINY, "names": ()})
    assert without_seconds(again) == without_seconds(expected)
    assert set(found) == {len(trained)}  # none was trained twice
    assert len(trained) >= after


def test_test_labels_decide_nothing(whole: Any, tmp_path: Path) -> None:
    """With the test labels shuffled every choice stays what it was; only the judgement changes."""
    _, expected = whole
    images = bench_data.image_folder(tmp_path / "bars", shuffled_test=True)
    found = bench_pairs(images, out=tmp_path / "run", **TINY)

    def choices(results: dict[str, Any]) -> Any:
        kept = ("name", "learning_rate", "validation_score", "weights", "steps")
        return [{k: m[k] for k in kept} for m in results["methods"]], results["verdict"]["method"]

    assert choices(found) == choices(expected)
    accuracies = [r["methods"][1]["values"]["left"]["accuracy"] for r in (found, expected)]
    assert accuracies[0] < accuracies[1] - 0.2


def test_trainings_are_given_no_test_labels(whole: Any) -> None:
    images, _ = whole
    data = ImagePairs.of(images, None, 120, (0.5, 0.2, 0.3), 0).encode()
    assert set(data.inputs) == {"train", "validation", "test"}
    assert set(data.targets) == {"train", "validation"}


def test_no_image_is_in_two_parts(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    marks = np.zeros((60, 28, 28), np.uint8)
    marks[:, 0, 0] = marks[:, 27, 27] = np.arange(60) + 1
    bench_data.write_idx(folder / "images-idx3-ubyte", marks)
    bench_data.write_idx(folder / "labels-idx1-ubyte", (np.arange(60) % 2).astype(np.uint8))
    pairs = ImagePairs.of(folder, None, 30, (0.5, 0.2, 0.3), 0)
    seen = [
        {*pairs.images[pairs.rows(part)][:, 0, 0], *pairs.images[pairs.rows(part)][:, -1, -1]}
        for part in ("train", "validation", "test")
    ]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert [len(pairs.rows(part)) for part in ("train", "validation", "test")] == [15, 6, 9]


def test_a_method_that_diverges_is_left_out_with_its_reason(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    images, expected = whole
    do = Workshop.do

    def failing(self: Workshop, stage: str, wanted: Any, observed: Any = None) -> None:
        wanted = list(wanted)
        if any(job.balancer == "famo" for job in wanted):
            raise TrainingError("epoch 1, step 3: the loss of 'left' is not finite")
        do(self, stage, wanted, observed)

    monkeypatch.setattr(Workshop, "do", failing)
    found = bench_pairs(images, out=tmp_path / "run", **TINY)
    assert [m["name"] for m in found["methods"]] == ["single_task", "equal", "scalarization", "mgda"]
    assert found["skipped"] == [{"name": "famo", "reason": "epoch 1, step 3: the loss of 'left' is not finite"}]
    mgda = [next(m for m in r["methods"] if m["name"] == "mgda") for r in (found, expected)]
    assert mgda[0]["delta_m_tasks"] == mgda[1]["delta_m_tasks"]


def test_a_method_that_needs_gradients_at_the_parameters_gets_them(whole: Any, tmp_path: Path) -> None:
    """It remembers coordinates: those of the representation are examples, and the last batch of an epoch has fewer."""
    images, _ = whole
    small = {"rows": 400, "seeds": 1, "epochs": 1, "trials": 1, "workers": 1, "names": ["excess_mtl", "mgda"]}
    found = bench_pairs(images, out=tmp_path / "run", **small)
    levels = {m: h["0"]["level"] for m, h in found["history"].items() if m in small["names"]}
    assert levels == {"excess_mtl": "exact", "mgda": "representation"}
    assert found["skipped"] == []


def test_what_the_loop_cannot_run_is_left_out_or_refused_where_it_was_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(method_bench, "RUNNABLE", ("losses", "gramian"))
    found, skipped = contenders((), 2)
    assert {"graddrop", "famo"} <= set(skipped)
    assert not {"graddrop", "famo"} & {m.name for m in found}
    assert skipped["graddrop"] == "needs jacobian, which the training loop does not give"
    with pytest.raises(InputError, match="graddrop cannot be compared here: it needs jacobian"):
        contenders(["graddrop"], 2)


def test_everything_in_the_registry_is_compared_or_left_out_with_a_reason() -> None:
    from polytask.registry import methods

    found, skipped = contenders((), 2)
    assert {m.name for m in found} | set(skipped) | {"equal"} == {m.name for m in methods("balancing")}
    assert all(skipped.values())
    # options that make an instance small for tests say nothing about its defaults
    assert not {m.name for m in methods("balancing") if m.example} & set(skipped)


def test_a_real_gain_is_told_and_a_copy_is_not() -> None:
    targets = labels(600)
    rng = np.random.default_rng(0)
    bench = Bench(TASKS, targets, 3)
    same = [decoded(rng, targets, 0.8) for _ in range(3)]
    for name, outputs in {
        "single_task": same,
        "equal": [decoded(rng, targets, 0.8) for _ in range(3)],
        "scalarization": same,
        "better": [decoded(rng, targets, 0.3) for _ in range(3)],
        "worse": [decoded(rng, targets, 2.0) for _ in range(3)],
    }.items():
        bench.add(name, outputs)
    names = {n: n.capitalize() for n in bench.values}
    found = compare(bench, names)
    assert found.best == "better"
    assert found.against["scalarization"]["single_task"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    against = next(s for s in found.sentences if s.startswith("Against Scalarization"))
    assert "2 of 4 rows cannot be told apart" in against
    assert "better than it: Better" in against
    assert "worse than it: Worse" in against
    assert not any("ranking of noise" in s for s in found.sentences)
    json.dumps(found.against, allow_nan=False)

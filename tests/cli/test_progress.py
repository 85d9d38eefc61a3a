"""What a person watches while a study runs."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from polytask.commands.progress import StudyView, minutes, read_job, time_left
from polytask.training.protocol import Job, scalarization


def shown(view: StudyView) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(view)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job((1,), "equal", (), 2), ("single-task model", "bought", "2")),
        (Job((0, 1, 2), "mgda", (), 0), ("mgda", "all 3", "0")),
        (Job((0, 2), "geometric_mean", (), 1), ("geometric_mean", "size, rating", "1")),
        (Job((0, 1, 2), "equal", (("log_losses", True),), 0), ("equal, log losses", "all 3", "0")),
        (scalarization([0.5, 1.5, 1.0]).jobs(0)[0], ("equal, weights 0.5 : 1.5 : 1", "all 3", "0")),
    ],
    ids=str,
)
def test_every_training_of_a_study_is_named_in_words(job, words):
    assert read_job(job.name, ("size", "bought", "rating")) == words


def test_the_view_shows_finished_trainings_and_the_time_that_goes_on():
    now = [100.0]
    view = StudyView(("size", "bought"), clock=lambda: now[0])
    assert "reading the table" in shown(view)
    view.tell(SimpleNamespace(stage="references", done=3, total=9, seconds=30.0, job="mgda_0-1_seed-0"))
    now[0] += 5
    text = shown(view)
    assert "references" in text
    assert "mgda" in text
    assert "3 of 9 trainings" in text
    assert "0:35 gone" in text
    assert "about 0:55 left" in text


def test_time_left_is_unknown_before_the_first_training_and_nothing_at_the_end():
    assert time_left(12.0, 0, 5) is None
    assert time_left(12.0, 5, 5) == 0


def test_minutes():
    assert [minutes(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]

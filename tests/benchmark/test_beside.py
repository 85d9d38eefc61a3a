"""Other libraries beside polytask: the file that brings them, what they do, and what memory is counted for whom."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from polytask.benchmark import Key, Workload, ours, read_beside
from polytask.benchmark.memory import peak_bytes
from polytask.errors import InputError

PEERS = Path(__file__).parents[2] / "benchmarks/peers.py"
GREEDY = """
import torch
from polytask.benchmark import Contender
from polytask.benchmark.contenders import plain

def make(work):
    step = plain(work)
    def greedy():
        torch.ones(16 * 2**20).sum()
        step()
    return greedy

def contenders():
    return [Contender("greedy 1.0", "equal", "values", make)]
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no file"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("def contenders(:", "SyntaxError"),
        ("x = 1", "has no attribute 'contenders'"),
        ("def contenders(): return []", "returns nothing"),
        ("def contenders(): return ['upgrad']", "returns str, not Contender"),
    ],
)
def test_a_file_that_brings_no_contenders(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "peers.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        read_beside(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel's own count of the peak is read from /proc"
)
def test_a_peak_holds_what_a_step_allocates(tmp_path: Path) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(GREEDY)
    base = peak_bytes("mlp", 2, None)
    greedy = peak_bytes("mlp", 2, Key("greedy 1.0", "equal", "values"), [path])
    assert base is not None
    assert greedy is not None
    more = (greedy - base) / 2**20
    assert 48 < more < 90  # 64 MiB of ones, less what the plain step had freed when they were made


def moved(make, n_tasks: int) -> torch.Tensor:
    work, before = Workload("mlp", n_tasks), Workload("mlp", n_tasks)
    make(work)()
    return torch.cat(
        [(p - q).detach().flatten() for p, q in zip(work.trunk.parameters(), before.trunk.parameters(), strict=True)]
    )


@pytest.mark.parametrize(
    ("library", "distribution", "method"),
    [
        ("torchjd", "torchjd", "equal"),
        ("torchjd", "torchjd", "mgda"),
        ("torchjd", "torchjd", "imtl_g"),
        ("LibMTL", "LibMTL", "equal"),
        ("LibMTL", "LibMTL", "mgda"),
    ],
)
def test_peers_take_the_steps_they_are_named_for(library: str, distribution: str, method: str) -> None:
    """A comparison of times means something only where both do the same: the direction of the first step agrees."""
    pytest.importorskip("torchjd" if library == "torchjd" else "torch")
    try:
        peers = read_beside(PEERS)
    except InputError:
        pytest.skip("neither torchjd nor LibMTL is installed (extra bench)")
    found = [
        c
        for c in peers
        if c.library.startswith(f"{distribution} ") and c.method == method and c.level != "representation"
    ]
    if not found:
        pytest.skip(f"{distribution} is not installed (extra bench)")
    own = next(c for c in ours([method], ["exact"]))
    theirs, mine = moved(found[0].make, 3), moved(own.make, 3)
    assert float(torch.nn.functional.cosine_similarity(theirs, mine, dim=0)) > 0.999

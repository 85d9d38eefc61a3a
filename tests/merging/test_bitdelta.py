"""BitDelta: signs of each expert and one size a matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from polytask.cli import app
from polytask.errors import InputError
from polytask.merging import MaskedExperts, merge, pack

from .conftest import SHAPES, distance, family
from .test_oracles import close, rows

MATRICES = [n for n, shape in SHAPES.items() if len(shape) == 2]


def one(W0: Tensor, *W: Tensor, expert: int = 0, **options: object) -> Tensor:
    return merge({"w": W0}, [{"w": w} for w in W], "bitdelta", expert=expert, **options)["w"]  # type: ignore[arg-type]


def test_it_is_its_formula() -> None:
    W0, D = rows(7, 9), rows(2, 7, 9, seed=1)
    D[:, 2] = 0
    for t in (0, 1):
        found = one(W0, *(W0 + D), expert=t) - W0
        alpha = sum(abs(float(x)) for x in D[t].flatten()) / 63
        assert found.flatten().tolist() == pytest.approx([alpha if x >= 0 else -alpha for x in D[t].flatten().tolist()])


def test_no_other_size_is_nearer() -> None:
    W0, tau = rows(8, 6), rows(8, 6, seed=1)
    found = one(W0, W0 + tau) - W0
    # what is left over is orthogonal to the signs
    assert abs(float(((tau - found) * found.sign()).sum())) < 1e-9 * float(tau.abs().sum())
    missed = float((tau - found).square().sum())
    for factor in (0.9, 1.1):
        assert missed < float((tau - factor * found).square().sum())


def test_task_vectors_of_one_size_come_back_whole() -> None:
    W0 = rows(5, 6)
    tau = 0.03 * rows(5, 6, seed=1).sign()
    assert close(one(W0, W0 + tau), W0 + tau, 1e-12)


def test_only_matrices_and_only_those_named_are_reduced() -> None:
    base, experts = family(3)
    whole = merge(base, experts, "bitdelta", expert=1)
    for n, v in experts[1].items():
        assert torch.allclose(whole[n], v) == (n not in MATRICES)
    some = merge(base, experts, "bitdelta", expert=1, layers="first.*")
    assert torch.equal(some["first.weight"], whole["first.weight"])
    assert torch.allclose(some["last.weight"], experts[1]["last.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["*", ["first.*"]])
def test_merging_for_one_expert_is_packing_and_unpacking(dtype: torch.dtype, layers: object, tmp_path: Path) -> None:
    base, experts = family(3, dtype=dtype)
    named = {
        n: {**e, "last.weight": torch.randn(t + 2, 24)} for t, (n, e) in enumerate(zip("abc", experts, strict=True))
    }
    packed = pack(base, named, "bitdelta", skip=["last.*"], layers=layers)
    packed.save(tmp_path / "packed")
    read = MaskedExperts.load(tmp_path / "packed")
    for name in "abc":
        found = merge(base, named, "bitdelta", skip=["last.*"], layers=layers, expert=name)
        for unpacked in (packed.expert(name), read.expert(name)):
            assert sorted(unpacked) == sorted(found)
            # what is the expert's own comes through a difference where it is merged
            assert distance(unpacked, found) < 1e-6
            assert torch.equal(unpacked["first.weight"], found["first.weight"])


def test_what_is_kept_is_small() -> None:
    W0 = torch.zeros(512, 512)
    experts = [{"w": rows(512, 512, seed=t, dtype=torch.float32)} for t in range(4)]
    packed = pack({"w": W0}, experts, "bitdelta")
    assert packed.bytes == 4 * 512**2 + 4 * 512**2 // 8
    assert not packed.unified


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_any_size(size: float) -> None:
    W0, tau = torch.zeros(9, 8), rows(9, 8, dtype=torch.float32)
    assert close(one(W0, size * tau) / size, one(W0, tau), 1e-5)
    assert not one(W0, W0).any()
    assert torch.equal(one(W0, size * tau, size * tau, expert=1), one(W0, size * tau))


def test_on_the_command_line(tmp_path: Path) -> None:
    base, experts = family(2, dtype=torch.float32)
    for name, state in {"base": base, "cars": experts[0], "digits": experts[1]}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{n}.safetensors") for n in ("base", "cars", "digits")]
    settings = (
        "--method",
        "bitdelta",
        "--set",
        "expert=digits",
        "--set",
        "layers=first.*",
        "--out",
        str(tmp_path / "out"),
    )
    done = CliRunner().invoke(app, ["merge", *paths, *settings])
    assert done.exit_code == 0, done.output
    expected = merge(base, experts, "bitdelta", expert=1, layers="first.*")
    assert distance(load_file(tmp_path / "out" / "model.safetensors"), expected) < 1e-6


def test_refusals(tmp_path: Path) -> None:
    base, experts = family(2)
    with pytest.raises(InputError, match="keeps experts apart: say whose model is wanted"):
        merge(base, experts, "bitdelta")
    with pytest.raises(InputError, match="there is no expert 2 among 2"):
        merge(base, experts, "bitdelta", expert=2)
    packed = pack(base, experts, "bitdelta")
    packed.save(tmp_path / "packed")
    about = json.loads((tmp_path / "packed" / "masks.json").read_text())
    (tmp_path / "packed" / "masks.json").write_text(json.dumps(about | {"sizes": [1, 2]}))
    with pytest.raises(InputError, match="holds no experts packed with masks"):
        MaskedExperts.load(tmp_path / "packed")

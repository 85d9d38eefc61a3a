"""OPCM against its recursion step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import make, merge
from polytask.merging.on_disk import MergePlan, write
from polytask.merging.opcm import OPCM

from .conftest import distance, family
from .test_oracles import close, of, rows


def stepwise(base: dict[str, Tensor], experts: list[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The authors' way: after each expert the whole model is brought to the mean length so far, which the next step undoes."""
    names = [n for n, v in base.items() if v.is_floating_point()]
    taus = [{n: e[n] - base[n] for n in names} for e in experts]
    length = lambda tau: float(sum(v.square().sum() for v in tau.values())) ** 0.5  # noqa: E731
    merged, before = taus[0], 1.0
    for t, tau in enumerate(taus[1:], 2):
        new = {}
        for n in names:
            own = tau[n]
            if own.ndim == 2:
                U, S, Vh = torch.linalg.svd(merged[n])
                P = U.T @ own @ Vh.T
                share = S.cumsum(0) / S.sum()
                r = next((i for i, s in enumerate(share.tolist()) if s > alpha), len(S))
                P[range(len(S)), range(len(S))] = 0
                P[:r, :r] = 0
                own = U @ P @ Vh
            new[n] = before * merged[n] + own
        mean = sum(length(x) for x in taus[:t]) / t
        before = length(new) / mean
        merged = {n: v / before for n, v in new.items()}
    return {n: base[n] + merged[n] for n in names}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_it_is_the_authors_recursion(alpha: float) -> None:
    base, experts = family(4)
    found = merge(base, experts, "opcm", alpha=alpha)
    assert distance(found, stepwise(base, experts, alpha)) < 1e-9


def test_the_merged_model_is_as_far_as_experts_are_on_average() -> None:
    base, experts = family(3, seed=1)
    names = [n for n, v in base.items() if v.is_floating_point()]
    flat = lambda s: torch.cat([(s[n] - base[n]).flatten() for n in names])  # noqa: E731
    expected = sum(float(flat(e).norm()) for e in experts) / 3
    assert float(flat(merge(base, experts, "opcm")).norm()) == pytest.approx(expected, rel=1e-12)


def test_matrices_that_come_again_change_nothing() -> None:
    W0, D = rows(9, 7), rows(1, 9, 7, seed=1)
    assert close(of("opcm", W0, W0 + D.repeat(3, 1, 1)) - W0, D[0])
    first, other = D[0], rows(9, 7, seed=2)
    twice = of("opcm", W0, W0 + torch.stack([first, 2 * first, other])) - W0
    once = of("opcm", W0, W0 + torch.stack([first, other])) - W0
    assert close(twice / twice.norm(), once / once.norm())


def test_what_is_added_has_nothing_along_the_leading_directions() -> None:
    W0, D = rows(12, 8), rows(2, 12, 8, seed=1)
    U, S, Vh = torch.linalg.svd(D[0], full_matrices=False)
    r = int((S.cumsum(0) <= 0.5 * S.sum()).sum())
    assert r > 1
    found = of("opcm", W0, W0 + D) - W0
    # the sum was only rescaled: what the first expert has along its own directions tells by how much
    factor = float(U[:, 0] @ found @ Vh[0]) / float(S[0])
    assert close(U[:, :r].T @ found @ Vh[:r].T, factor * torch.diag(S[:r]))
    # outside of them the second expert came in whole
    assert float((found - factor * D[0]).norm()) > 0.5 * factor * float(D[1].norm())


def test_at_alpha_one_a_full_space_takes_nothing_more() -> None:
    D = rows(2, 6, 6, seed=3)
    W0 = torch.zeros(6, 6).double()
    assert close(of("opcm", W0, D, alpha=1.0) / D.flatten(1).norm(dim=1).mean(), D[0] / D[0].norm())


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_one_expert_and_zeros_at_any_size(size: float) -> None:
    W0, D = torch.zeros(6, 5), size * rows(2, 6, 5, dtype=torch.float32)
    assert close(of("opcm", W0, D[:1]), D[0], 1e-5)
    zero = torch.zeros_like(D[:1])
    assert not of("opcm", W0, zero.repeat(2, 1, 1)).any()
    for pair in (torch.cat([zero, D[:1]]), torch.cat([D[:1], zero])):
        assert close(of("opcm", W0, pair), D[0] / 2, 1e-5)
    assert close(of("opcm", W0, D) / size, of("opcm", W0, D / size), 1e-4)


def test_weights_come_before_everything() -> None:
    W0, D = rows(9, 7), rows(3, 9, 7, seed=1)
    w = torch.tensor([2.0, 0.5, -1.0]).double()
    expected = of("opcm", W0, W0 + w.view(3, 1, 1) * D) - W0
    assert close(of("opcm", W0, W0 + D, weights=w.tolist(), scale=0.3) - W0, 0.3 * expected)


def test_alpha_is_a_share() -> None:
    with pytest.raises(InputError, match="alpha of opcm lies between 0 and 1"):
        make("opcm", alpha=1.5)


def test_on_disk_sums_are_kept_when_a_merge_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = family(3, dtype=torch.float32)
    for name, state in zip(("base", "a", "b", "c"), (base, *experts), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")

    def plan() -> MergePlan:
        files = [tmp_path / f"{n}.safetensors" for n in "abc"]
        return MergePlan(files, tmp_path / "base.safetensors", "opcm", lambda _: {"alpha": 0.7}, shard_size=2000)

    def killed(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan(), tmp_path / "out", progress=killed)
    monkeypatch.setattr(OPCM, "projected", lambda *_: pytest.fail("it had been projected before"))
    write(plan(), tmp_path / "out")
    monkeypatch.undo()
    found = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    expected = merge(base, experts, "opcm", alpha=0.7)
    assert all(torch.equal(found[n], v) for n, v in expected.items())

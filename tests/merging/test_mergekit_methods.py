"""Methods that mergekit brought up: numbers that its version 0.1.5 gives, and what follows from their formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from polytask.errors import InputError
from polytask.merging import make, merge
from polytask.merging.base import CHUNK
from polytask.merging.config import read_config

from .conftest import distance, family

I = torch.arange(12, dtype=torch.float64).reshape(3, 4)  # noqa: E741
W0, A, B = I.cos(), (2 * I).sin(), (1.5 * I).cos()
C = W0 + 0.1 * (I % 3 == 0) * I.sin()


def of(method: str, *W: Tensor, base: Tensor | None = None, **options: Any) -> Tensor:
    state = None if base is None else {"w": base}
    return merge(state, [{"w": w} for w in W], method, **options)["w"]


def of_three(method: str, **options: Any) -> Tensor:
    return of(method, A, B, C, base=W0, **options)


# fmt: off
GOLDEN: dict[str, tuple[Tensor, list[float]]] = {
    "nuslerp": (
        of("nuslerp", A, B, weights=[1, 3]),
        [0.910882, 0.402927, -1.183492, -0.296025, 1.242899, 0.113227, -1.029676, -0.064396, 0.661477, 0.262341, -0.352134, -0.643096],
    ),
    "nuslerp, base_model": (
        of("nuslerp", A, B, base=W0, weights=[1, 3], around_base=True),
        [0.703087, 0.267676, -0.984353, -0.144814, 1.14769, 0.089167, -1.007309, -0.176474, 0.617467, 0.362214, -0.254264, -0.574809],
    ),
    "nuslerp, nuslerp_flatten: false": (
        of("nuslerp", A, B, weights=[1, 3], flatten=False),
        [0.815879, 0.329041, -1.033539, -0.25536, 1.128807, 0.118499, -0.942149, -0.084222, 1.022481, 0.221849, -0.325208, -1.07735],
    ),
    "nuslerp, nuslerp_row_wise: true": (
        of("nuslerp", A, B, weights=[1, 3], flatten=False, row_wise=True),
        [0.829536, 0.721035, -1.100139, -0.388786, 1.101947, 0.068392, -0.959584, 0.009233, 0.611121, 0.243991, -0.350005, -0.791245],
    ),
    "nearswap": (
        of("nearswap", A, B, t=0.25),
        [0.25, 0.659297, -0.989992, -0.210796, 0.96017, -0.294021, -0.786573, 0.740607, -0.037903, -0.500987, 0.662945, -0.258851],
    ),
    "arcee_fusion": (
        of("arcee_fusion", A, B),
        [0.0, 0.909297, -0.756802, -0.279415, 0.989358, -0.544021, -0.536573, 0.990607, -0.287903, 0.594921, -0.759688, -0.008851],
    ),
    "ram": (
        of_three("ram"),
        [0.0, 0.490017, -0.873397, -0.488697, 0.974764, -0.098693, -0.171825, 0.257535, 0.277975, -0.341995, 0.076629, -0.355624],
    ),
    "ram, epsilon": (
        of_three("ram", epsilon=0.5),
        [0.0, 0.540302, -0.989992, -0.245106, 0.974764, -0.544021, -0.723852, -0.475537, 0.843854, 0.594921, 0.912945, -0.702397],
    ),
    "ramplus_tl": (
        of_three("ramplus_tl", epsilon=0.5),
        [-0.02, 0.540302, -1.001469, -0.245106, 0.974764, -0.560575, -0.723852, -0.500126, 0.863641, 0.625042, 0.947986, -0.716533],
    ),
    "ramplus_tl, r and alpha": (
        of_three("ramplus_tl", epsilon=0.5, r=0.5, alpha=3),
        [-0.5, 0.540302, -1.162146, -0.245106, 0.974764, -0.957863, -0.723852, -0.844369, 1.14066, 1.046736, 1.788954, -0.914444],
    ),
}
# fmt: on


@pytest.mark.parametrize("case", GOLDEN)
def test_the_numbers_that_mergekit_gives(case: str) -> None:
    found, expected = GOLDEN[case]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.75, 1.0])
def test_nuslerp_turns_by_its_share_of_the_angle(t: float) -> None:
    a, b = (v / v.norm() for v in (A, B))
    found = of("nuslerp", a, b, weights=[1 - t, t])
    angle = math.acos(float((a * b).sum()))
    assert float(found.norm()) == pytest.approx(1)
    assert float((found * a).sum()) == pytest.approx(math.cos(t * angle))
    assert float((found * b).sum()) == pytest.approx(math.cos((1 - t) * angle))


def test_nuslerp_vector_by_vector() -> None:
    rows = of("nuslerp", A, B, weights=[1, 2], flatten=False)
    for row, a, b in zip(rows, A, B, strict=True):
        assert torch.allclose(row, of("nuslerp", a, b, weights=[1, 2]))
    columns = of("nuslerp", A, B, weights=[1, 2], flatten=False, row_wise=True)
    assert torch.allclose(columns, of("nuslerp", A.T.clone(), B.T.clone(), weights=[1, 2], flatten=False).T)


def test_nuslerp_where_there_is_no_arc() -> None:
    assert torch.allclose(of("nuslerp", A, 3 * A, weights=[1, 3]), 2.5 * A)
    assert torch.allclose(of("nuslerp", A, -A, weights=[1, 3]), -0.5 * A)
    assert torch.allclose(of("nuslerp", torch.zeros_like(A), B), math.sqrt(0.5) * B)
    assert torch.allclose(of("nuslerp", A, B, weights=[1, -1]), of("nuslerp", A, B))
    with pytest.raises(InputError, match="around the base needs the base"):
        of("nuslerp", A, B, around_base=True)
    with pytest.raises(InputError, match="nuslerp merges 1 to 2 experts, not 3"):
        of("nuslerp", A, B, C)


def test_nearswap_goes_no_further_than_t() -> None:
    found = of("nearswap", B, base=A, t=0.3)
    near = (A - B).abs() <= 0.3
    assert torch.allclose(found[near], B[near])
    assert torch.allclose((found - A)[~near], 0.3 * (B - A)[~near].sign())
    assert torch.equal(of("nearswap", A, B, base=C, t=0.3), found)  # two experts need no base
    with pytest.raises(InputError, match="t of nearswap lies between 0"):
        make("nearswap", t=-1.0)


@pytest.mark.parametrize("name", ["nearswap", "arcee_fusion"])
def test_one_model_is_too_few(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} needs two models: a base and an expert, or two experts"):
        of(name, A)


@pytest.mark.parametrize("shape", [(3, 4), (700, 400), (5, 6, 7), (30,)])
def test_fusion_takes_what_stands_out(shape: tuple[int, ...]) -> None:
    assert CHUNK < 700 * 400
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    divergence = kl_divergence(Categorical(logits=b), Categorical(logits=a))
    importance = (a - b).abs() * divergence[..., None]
    low, middle, high = torch.quantile(
        importance.flatten(), torch.tensor([0.25, 0.5, 0.75]).double(), interpolation="lower"
    )
    taken = importance >= middle + 1.5 * (high - low)
    assert 0 < int(taken.sum()) < taken.numel() / 2
    assert torch.equal(of("arcee_fusion", b, base=a), torch.where(taken, b, a))


def test_ram_keeps_whole_what_one_expert_alone_changed() -> None:
    base, experts = family(3)
    n = "first.weight"
    areas = [(torch.arange(24) % 3 == t)[:, None] for t in range(3)]
    apart = [torch.where(area, e[n], base[n]) for area, e in zip(areas, experts, strict=True)]
    united = sum(torch.where(area, e[n], 0) for area, e in zip(areas, experts, strict=True))
    found = of("ram", *apart, base=base[n], epsilon=0.0)
    assert torch.allclose(found, united)
    # nothing is shared, so that nothing is enlarged; weights count where the experts do
    assert torch.equal(of("ramplus_tl", *apart, base=base[n], epsilon=0.0, r=5.0), found)
    weighed = of("ram", *apart, base=base[n], epsilon=0.0, weights=[2.0, 1.0, 1.0])
    assert torch.allclose(weighed - base[n], torch.where(areas[0], 2.0, 1.0) * (found - base[n]))
    # where all of them changed all, there is the mean
    mean = sum(e[n] for e in experts) / 3
    for method in ("ram", "ramplus_tl"):
        assert torch.allclose(of(method, *(e[n] for e in experts), base=base[n], epsilon=0.0), mean)


def test_ram_plus_counts_over_the_whole_tensor() -> None:
    n, g = CHUNK, torch.Generator().manual_seed(0)
    base = torch.zeros(n)
    one, two = (torch.randn(2, n, generator=g) > 0.3).float()
    shared, alone = float((one * two).sum()), float((one * (1 - two)).sum())
    found = of("ramplus_tl", one, two, base=base, r=0.5, alpha=100.0)
    only = (one == 1) & (two == 0)
    assert torch.allclose(found[only], torch.tensor(1 + 0.5 * shared / alone))
    assert torch.equal(found[(one == 1) & (two == 1)], torch.ones(int(shared)))


def test_mergekit_s_files(tmp_path: Path) -> None:
    base, experts = family(2, dtype=torch.float32)
    for name, state in (("base", base), ("a", experts[0]), ("b", experts[1])):
        save_file(state, tmp_path / f"{name}.safetensors")

    def options(text: str) -> dict[str, Any]:
        (tmp_path / "c.yml").write_text(text)
        plan = read_config(tmp_path / "c.yml")
        return dict(plan.options("last.weight"))

    both = (
        "models: [{model: a.safetensors, parameters: {weight: 1}}, {model: b.safetensors, parameters: {weight: 3}}]\n"
    )
    based, flat = "base_model: base.safetensors\n", "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"
    assert options(both + "merge_method: nuslerp\n") == {"weights": [1, 3]}
    turned = {"weights": [1, 3], "flatten": False, "row_wise": True}
    assert options(both + "merge_method: nuslerp\n" + flat) == turned
    assert options(both + based + "merge_method: nuslerp\n") == {"weights": [1, 3], "around_base": True}
    plain = "models: [{model: a.safetensors}, {model: b.safetensors}]\n" + based
    assert options(plain + "merge_method: ram\n") == {"scale": 1.0}
    told = "parameters: {epsilon: 1e-4, r: 0.2, alpha: 0.3}\n"
    assert options(plain + "merge_method: ramplus_tl\n" + told) == {
        "scale": 1.0,
        "epsilon": "1e-4",
        "r": 0.2,
        "alpha": 0.3,
    }
    # what files set by habit, and mergekit passes over
    habit = "parameters: {normalize: true, int8_mask: true, rescale: false}\n"
    assert options("models: [{model: a.safetensors}]\n" + based + "merge_method: arcee_fusion\n" + habit) == {}
    near = "models: [{model: a.safetensors}]\n" + based + "merge_method: nearswap\nparameters: {t: 0.05}\n"
    assert options(near) == {"t": 0.05}


def test_half_of_a_million_weights_in_float32() -> None:
    """Sums over a tensor of many entries keep their digits."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1 << 19, generator=g)
    for method, options in (
        ("nuslerp", {}),
        ("nuslerp", {"flatten": False}),
        ("nuslerp", {"around_base": True, "weights": [1, 2]}),
        ("nearswap", {}),
        ("ram", {}),
        ("ramplus_tl", {}),
    ):
        for near in (1.0, 1e-3):  # the second model close to the first
            models, base = [a, a + near * (b - a)], 0.1 * b
            narrow = of(method, *models, base=base, **options)
            wide = of(method, *(m.double() for m in models), base=base.double(), **options)
            assert distance({"w": narrow}, {"w": wide}) < 1e-6

"""State dicts as they come in the wild, and calls as they go wrong: every merger and filter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from polytask.errors import InputError
from polytask.merging import merge
from polytask.registry import Method

from .conftest import MERGERS, State, experts_for, family, merged, some_statistics


def laid_out_otherwise(state: State) -> State:
    """The same values with other strides: transposed matrices, channels last, every other entry."""
    found = {}
    for n, v in state.items():
        if v.ndim == 2:
            found[n] = v.t().contiguous().t()
        elif v.ndim == 4:
            found[n] = v.to(memory_format=torch.channels_last)
        else:
            found[n] = torch.stack([v, v], -1)[..., 0]
    return found


def test_strides_do_not_matter(method: Method) -> None:
    base, experts = family(experts_for(method), seed=9)
    plain = merged(method, base, experts)
    found = merged(method, laid_out_otherwise(base), [laid_out_otherwise(e) for e in experts])
    assert all(torch.equal(found[n], v) for n, v in plain.items())
    assert all(v.is_contiguous() for v in found.values())


def test_empty_tensors_pass(method: Method) -> None:
    base, experts = family(experts_for(method), seed=10)
    more = {"nothing": torch.zeros(0).double(), "no.rows": torch.zeros(0, 4).double(), "no.columns": torch.zeros(4, 0)}
    found = merged(method, base | more, [e | more for e in experts])
    assert {n: found[n].shape for n in more} == {n: v.shape for n, v in more.items()}


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
def test_the_default_dtype_does_not_matter(method: Method) -> None:
    base, experts = family(experts_for(method), seed=11, dtype=torch.float32)
    found = merged(method, base, experts)
    torch.set_default_dtype(torch.float32)
    plain = merged(method, base, experts)
    assert all(v.dtype == base[n].dtype and torch.allclose(v, plain[n], atol=1e-6) for n, v in found.items())


def test_options_are_those_that_can_be_given() -> None:
    for entry in MERGERS.values():
        assert not {"elect", "sparsify"} & set(entry.options)


BASE = {"w": torch.eye(4)}
EXPERTS = [{"w": torch.eye(4) + 0.1 * t} for t in (1, 2)]
WRONG: list[tuple[Any, Any, str, dict[str, Any], str]] = [
    (torch.nn.Linear(2, 2), EXPERTS, "ties", {}, r"the base is a Linear, not a state dict .*: give its state_dict\(\)"),
    (BASE, BASE, "ties", {}, "w is a Tensor, not a state dict"),
    (EXPERTS, BASE, "ties", {}, "the base is a list, not a state dict"),
    ({"w": torch.eye(4, device="meta")}, EXPERTS, "ties", {}, "w of the base is on the meta device"),
    ({"w": torch.eye(4).to_sparse()}, EXPERTS, "ties", {}, "w of the base is sparse_coo"),
    (BASE, EXPERTS, "ties", {"scale": [1.0, 2.0]}, r"the scale is a number, not \[1.0, 2.0\]"),
    (BASE, EXPERTS, "ties", {"scale": True}, "the scale is a number, not True"),
    (BASE, EXPERTS, "ties", {"density": True}, "the density is a number, .* not True"),
    (BASE, EXPERTS, "ties", {"normalize": "false"}, "normalize of ties is true or false, not 'false'"),
    (BASE, EXPERTS, "wudi", {"steps": 1.5}, "steps of wudi is a whole number, not 1.5"),
    (BASE, EXPERTS, "ties", {"dtype": torch.int8}, "the dtype of a merged model is .* not 'int8'"),
    (BASE, EXPERTS, "ties", {"filters": [3]}, "a filter is given by its name, .* not 3"),
    (BASE, EXPERTS, "ties", {"skip": "head.*"}, r"no tensor's name fits the skip pattern 'head\.\*'"),
    (
        BASE,
        EXPERTS,
        "knots",
        {"inner_options": "density"},
        "options of the method within knots are given by their names",
    ),
    (BASE, EXPERTS, "adamerging", {}, "adamerging runs the model while it merges: give model= and inputs="),
    (BASE, EXPERTS, "EMR", {}, "emr keeps experts apart: say whose model is wanted, expert=NAME"),
    (BASE, EXPERTS, "esm++", {}, "esm_pp keeps experts in one model: polytask.merging.route_by_prototypes"),
    (BASE, EXPERTS, "trim", {}, "trim is no merging method: it is a filter"),
    (BASE, EXPERTS, "tiess", {}, "there is no merging method called 'tiess'; did you mean ties"),
]


@pytest.mark.parametrize(("base", "experts", "name", "options", "said"), WRONG, ids=range(len(WRONG)))
def test_one_sentence(base: Any, experts: Any, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        merge(base, experts, name, **options)


def test_one_filter_or_pattern_needs_no_list() -> None:
    base, experts = family(2)
    found = merge(base, experts, "ties", skip="first.*", filters="trim:density=0.5")
    listed = merge(base, experts, "ties", skip=["first.*"], filters=["trim:density=0.5"])
    assert all(torch.equal(found[n], v) for n, v in listed.items())
    assert torch.equal(found["first.weight"], base["first.weight"])


@pytest.mark.parametrize("name", [n for n, m in MERGERS.items() if m.needs == "statistics"])
def test_statistics_of_something_else(name: str) -> None:
    base, experts = family(2)
    entry = MERGERS[name]
    good = [some_statistics(entry, t) for t in range(2)]
    label = r"first\.weight"
    cut = {n: v[:-1, :-1] if v.ndim == 2 else v for n, v in good[1].items()}
    with pytest.raises(InputError, match=f"of {label} of two has shape .*, and its tensor asks for"):
        merge(base, dict(zip(("one", "two"), experts, strict=True)), name, statistics=[good[0], cut])
    spoilt = {n: v * float("nan") for n, v in good[1].items()}
    with pytest.raises(InputError, match=f"{label} in the .* of two holds NaN"):
        merge(base, dict(zip(("one", "two"), experts, strict=True)), name, statistics=[good[0], spoilt])


def test_statistics_may_be_rounded() -> None:
    for name, entry in MERGERS.items():
        if entry.needs == "statistics":
            base, experts = family(2, dtype=torch.float32)
            given = [{n: v.float() for n, v in some_statistics(entry, t).items()} for t in range(2)]
            found, exact = (
                merge(base, experts, name, statistics=s)
                for s in (given, [{n: v.double() for n, v in g.items()} for g in given])
            )
            assert all(torch.equal(found[n], v) for n, v in exact.items())


def test_variances_stay_variances() -> None:
    base = {"bn.running_var": torch.tensor([1.0, 1.0]), "bn.running_mean": torch.tensor([1.0, 1.0])}
    experts = [{n: v - torch.tensor([0.9, 0.1]) for n, v in base.items()} for _ in range(4)]
    found = merge(base, experts, "task_arithmetic", scale=0.5)
    assert torch.allclose(found["bn.running_mean"], torch.tensor([-0.8, 0.8]))
    assert torch.allclose(found["bn.running_var"], torch.tensor([0.1, 0.8]))


@pytest.mark.parametrize(
    "weights", [np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]), (0.5, 2.0), {"b": 2.0, "a": 0.5}, [np.float32(0.5), 2]]
)
def test_numbers_of_each_expert_in_any_form(weights: Any) -> None:
    base, experts = family(2, seed=12)
    named = dict(zip(("a", "b"), experts, strict=True))
    found = merge(base, named, "ties", weights=weights, density=np.float32(0.5), normalize=np.bool_(True))
    expected = merge(base, named, "ties", weights=[0.5, 2.0], density=0.5)
    assert all(torch.equal(found[n], v) for n, v in expected.items())


def test_names_of_other_experts_are_no_weights() -> None:
    base, experts = family(2)
    with pytest.raises(InputError, match="a weight is a number, or one for each expert, not"):
        merge(base, dict(zip(("a", "b"), experts, strict=True)), "ties", weights={"a": 1.0})

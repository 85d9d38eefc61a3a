"""What a method makes of its input does not depend on the type that new tensors have by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from polytask.registry import Method

from .conftest import build, run, script, through_json


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_default_type_changes_a_step(method: Method, dtype: torch.dtype, other: torch.dtype) -> None:
    steps = [(J.to(dtype), values.to(dtype)) for J, values in script(3)]
    expected = run(build(method), steps, ["a", "b", "c"])
    torch.set_default_dtype(other)
    b = build(method)
    found = run(b, steps[:5], ["a", "b", "c"])
    resumed = build(method)
    resumed.load_state_dict(through_json(b.state_dict()))
    found += run(resumed, steps[5:], ["a", "b", "c"], first=5)
    for d, e in zip(found, expected, strict=True):
        assert d.dtype == dtype
        assert float((d - e).norm()) <= 1e-5 * float(e.norm())

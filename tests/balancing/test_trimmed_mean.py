"""The trimmed mean against sorting."""

from __future__ import annotations

import pytest
import torch

from polytask.balancing import make


@pytest.mark.parametrize("trim", [0, 1, 2, 5])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 13])
def test_as_by_sorting(tasks, trim):
    generator = torch.Generator().manual_seed(tasks)
    J = torch.randn(tasks, 40_000, generator=generator, dtype=torch.float64).round(decimals=1)  # with many ties
    t = min(trim, (tasks - 1) // 2)
    p = torch.linspace(1, 2, tasks, dtype=torch.float64)
    expected = torch.sort(J * (p * tasks / p.sum())[:, None], dim=0).values[t : tasks - t].mean(0)
    d = make("trimmed_mean", trim=trim, preference=p.tolist()).direction(J)
    assert torch.allclose(d, expected, rtol=1e-12, atol=1e-12)


def test_an_outlier_leaves_no_trace():
    """Nothing of it is added and taken away again."""
    J = torch.randn(5, 1000)
    J[2] = 1e30 * torch.sign(J[2])
    ordered = J.double().sort(0).values[1:4].mean(0)
    assert torch.allclose(make("trimmed_mean").direction(J).double(), ordered, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_added_up_in_single_precision(dtype):
    J = torch.randn(50, 300).to(dtype)
    d = make("trimmed_mean").direction(J)
    assert d.dtype == dtype
    assert torch.allclose(d.float(), J.float().sort(0).values[1:49].mean(0), rtol=1e-2, atol=1e-3)

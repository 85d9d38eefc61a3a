"""Task gradients in the form in which they arrive answer as their rows would."""

from __future__ import annotations

import pytest
import torch

from polytask.autograd import DenseGradients, LinearGradients


def arrived(form: str, dtype: torch.dtype = torch.float64, tasks: int = 5):
    """Gradients with many coordinates, in pieces; those of linear heads with one output or several."""
    generator = torch.Generator().manual_seed(0)
    outputs = [1] * tasks if form == "scalar heads" else [1 + k % 3 for k in range(tasks)]
    ends = torch.tensor(outputs).cumsum(0).tolist()
    columns = [slice(end - n, end) for end, n in zip(ends, outputs, strict=True)]
    D = torch.randn(700, ends[-1], generator=generator, dtype=torch.float64).to(dtype)
    W = torch.randn(ends[-1], 128, generator=generator, dtype=torch.float64).to(dtype)
    linear = LinearGradients(D, W, columns)
    return DenseGradients(linear.rows()) if form == "rows" else linear


FORMS = ("rows", "scalar heads", "heads of several outputs")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_pulls_are_sums_and_sums_of_sizes(form, scale):
    gradients = arrived(form)
    p = torch.linspace(0.0, 2.0, 5, dtype=torch.float64) * scale
    total, size = (torch.cat(parts) for parts in zip(*gradients.pulls(p), strict=True))
    rows = p[:, None] * gradients.rows()
    assert torch.allclose(total, rows.sum(0), rtol=1e-9, atol=1e-12 * scale)
    assert torch.allclose(size, rows.abs().sum(0), rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_gradient_pulls_the_other_way_both_are_equal(form, dtype):
    """To the last bit, so that their difference is 0."""
    gradients = arrived(form, dtype, tasks=3)
    each = [torch.cat(list(gradients.select([k]).rows())) for k in range(3)]
    total, size = (torch.cat(parts) for parts in zip(*gradients.pulls(torch.ones(3)), strict=True))
    assert total.dtype == size.dtype == torch.float32
    up, down = (torch.stack([side(g, 0) for g in each]).all(0) for side in (torch.gt, torch.lt))
    assert 0 < int(up.sum()) < len(up)
    assert torch.equal(total[up], size[up])
    assert torch.equal(total[down], -size[down])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [0, 1], [3, 1, 4], [2]])
def test_gramian_and_combination_are_those_of_the_rows(form, kept):
    gradients = arrived(form).select(kept)
    rows, w = gradients.rows().clone(), torch.linspace(-1, 1, len(kept), dtype=torch.float64)
    assert torch.allclose(gradients.gramian(), rows @ rows.T, rtol=1e-9)
    assert torch.allclose(gradients.combination(w), w @ rows, rtol=1e-9, atol=1e-9)
    assert gradients.dtype == torch.float64

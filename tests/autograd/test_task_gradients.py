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
    D = torch.randn(300, ends[-1], generator=generator, dtype=torch.float64).to(dtype)
    W = torch.randn(ends[-1], 256, generator=generator, dtype=torch.float64).to(dtype)
    linear = LinearGradients(D, W, columns)
    return DenseGradients(linear.rows()) if form == "rows" else linear


FORMS = ("rows", "scalar heads", "heads of several outputs")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_pulls_are_sums_of_positive_and_negative_parts(form, scale):
    gradients = arrived(form)
    p = torch.linspace(0.0, 2.0, 5, dtype=torch.float64) * scale
    up, down = (torch.cat(parts) for parts in zip(*gradients.pulls(p), strict=True))
    rows = p[:, None] * gradients.rows()
    assert torch.allclose(up, rows.clamp_min(0).sum(0), rtol=1e-9, atol=1e-12 * scale)
    assert torch.allclose(down, rows.clamp_max(0).sum(0), rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_gradient_pulls_the_other_way_nothing_is_left_of_it(form, dtype):
    """Exactly, though both are told apart by a difference of sums."""
    gradients = arrived(form, dtype, tasks=1 if form == "heads of several outputs" else 3)
    rows = gradients.rows().float()
    ones = torch.ones(len(rows))
    up, down = (torch.cat(parts) for parts in zip(*gradients.pulls(ones), strict=True))
    assert up.dtype == torch.float32
    agreeing = (rows >= 0).all(0)
    assert 0 < int(agreeing.sum()) < rows.shape[1]
    assert bool((down[agreeing] == 0).all())
    assert bool((up[(rows <= 0).all(0)] == 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_gramian_and_combination_are_those_of_the_rows(form):
    gradients = arrived(form)
    rows, w = gradients.rows().clone(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    assert torch.allclose(gradients.gramian(), rows @ rows.T, rtol=1e-9)
    assert torch.allclose(gradients.combination(w), w @ rows, rtol=1e-9, atol=1e-9)
    assert gradients.dtype == torch.float64

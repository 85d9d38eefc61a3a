"""The calibration error on predictions whose error is known."""

from __future__ import annotations

import pytest
import torch

from polytask.metrics.calibration import expected_calibration_error


def sure(confidence: float, n: int) -> torch.Tensor:
    return torch.tensor([[confidence, 1 - confidence]]).expand(n, 2)


@pytest.mark.parametrize("confidence", [0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("right", [0, 30, 75, 100])
def test_one_confidence(confidence: float, right: int) -> None:
    labels = torch.tensor([0] * right + [1] * (100 - right))
    found = expected_calibration_error(sure(confidence, 100), labels)
    assert found == pytest.approx(abs(right / 100 - confidence), abs=1e-6)


def test_errors_of_different_bins_do_not_cancel() -> None:
    probabilities = torch.cat([sure(0.9, 10), sure(0.6, 10)])
    labels = torch.tensor([0] * 6 + [1] * 4 + [0] * 9 + [1])  # 60 % right where 90 % sure, 90 % right where 60 % sure
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.3, abs=1e-6)
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(0, abs=1e-6)


def test_order_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    probabilities = torch.randn(200, 5, generator=g).softmax(-1)
    labels = torch.randint(5, (200,), generator=g)
    order = torch.randperm(200, generator=g)
    assert expected_calibration_error(probabilities[order], labels[order]) == pytest.approx(
        expected_calibration_error(probabilities, labels)
    )

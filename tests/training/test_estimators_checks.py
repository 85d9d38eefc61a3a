"""scikit-learn's own suite of checks, run on all three estimators: all of it applies, and no failure is expected."""

from __future__ import annotations

from typing import Any

from sklearn.utils.estimator_checks import parametrize_with_checks

from polytask import MultiTaskClassifier, MultiTaskEstimator, MultiTaskRegressor

# a small network in few epochs: the checks fit some hundreds of times
QUICK: dict[str, Any] = {"epochs": 8, "batch_size": 32, "learning_rate": 0.02, "width": 16, "depth": 1, "dropout": 0.0}


@parametrize_with_checks([MultiTaskClassifier(**QUICK), MultiTaskRegressor(**QUICK), MultiTaskEstimator(**QUICK)])
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)

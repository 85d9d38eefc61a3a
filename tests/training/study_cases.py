"""Small tables whose tasks are known to help one another, and the smallest budget a study can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polytask.training.study import Study, run_study

TARGETS = ("size", "bought", "visits")
TINY: dict[str, Any] = {
    "seeds": 2,
    "epochs": 2,
    "trials": 2,
    "balance": "log_losses",
    "model": {"width": 16, "depth": 1},
    "training": {"batch_size": 64},
    "workers": 1,
}


def small_table(rows: int = 300) -> pd.DataFrame:
    """Three targets of three kinds that hang on one hidden quantity; a third of the labels of one of them missing."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, rows))
    hidden = a - 0.5 * b
    bought = np.where(hidden + 0.5 * rng.normal(size=rows) > 0, "yes", "no").astype(object)
    bought[rng.random(rows) < 0.3] = None
    return pd.DataFrame(
        {
            "a": a,
            "b": b,
            "c": c,
            "colour": rng.choice(list("rgb"), rows),
            "shop": [f"shop {i % 30}" for i in range(rows)],
            "size": 10 + hidden + 0.3 * rng.normal(size=rows),
            "bought": bought,
            "visits": rng.poisson(np.exp(0.8 * hidden)),
        }
    )


def tiny_study(out: Path, **options: Any) -> Study:
    """A study of the small table within seconds."""
    return run_study(
        small_table(),
        TARGETS,
        out=out,
        source="small",
        **{**TINY, "kinds": {"visits": "count"}, "ignore": ("shop",), **options},
    )


def without_seconds(value: Any) -> Any:
    """Results without what the clock says."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k and k not in ("cost", "reasons")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value

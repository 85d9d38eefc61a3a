"""Names of other libraries that mean a method of this one with certain options."""

from __future__ import annotations

import contextlib
from typing import Any

from polytask.errors import InputError
from polytask.registry import Method, find, spelling

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "log_imtl": ("imtl_g", {"log_losses": True}),  # the benchmark scripts' IMTL is IMTL-G
    "psmgd": ("mgda", {"every": 4}),  # periodic stochastic multi-gradient descent, arXiv:2412.10961
    "mtch": ("tchebycheff", {"modified": True}),
    "mtche": ("tchebycheff", {"modified": True}),
    "asf": ("tchebycheff", {"modified": True}),
    "aasf": ("tchebycheff", {"modified": True, "rho": 0.1}),
    "gs_mgda": ("modo", {"batches": 1, "steps": 5, "gamma": 0.1, "rho": 0.0}),
    "softtche": ("stch", {"warmup": None, "mu": 0.1}),
    "softmtche": ("stch", {"warmup": None, "mu": 0.1, "modified": True}),
    "smtche": ("stch", {"warmup": None, "mu": 0.1, "modified": True}),
    "stche": ("stch", {"warmup": None, "mu": 0.1}),
}
_SPELLINGS = {spelling(name): said for name, said in PRESETS.items()}


def resolve(name: str) -> tuple[Method, dict[str, Any]]:
    """The balancing method that a name means, and the options it implies.

    ``LOG_X`` is X on logarithms of the losses; ``XWeighting``, as TorchJD calls what weighs by a Gramian, is X.

    Raises:
        InputError: no such method; the message suggests the nearest names.
    """
    key = spelling(name) if isinstance(name, str) else ""
    if key in _SPELLINGS:
        method, implied = _SPELLINGS[key]
        return find(method, family="balancing"), dict(implied)
    bare = key.removesuffix("weighting")
    readings: list[tuple[str, dict[str, Any]]] = [(name, {}), (bare, {})]
    if bare.startswith("log"):
        readings.append((bare.removeprefix("log"), {"log_losses": True}))
    for reading, implied in readings:
        with contextlib.suppress(InputError):
            return find(reading, family="balancing"), implied
    return find(name, family="balancing"), {}

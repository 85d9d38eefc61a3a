"""State without NumPy's types, so that any checkpoint can hold it as data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

ARRAY = "numpy array"


def packed(state: Any) -> Any:
    """A copy without NumPy's arrays and numbers, which ``torch.load`` takes for code; :func:`unpacked` puts them back."""
    if isinstance(state, Mapping):
        return {key: packed(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {ARRAY: torch.from_numpy(state.copy())}
    return state.item() if isinstance(state, np.generic) else copy.deepcopy(state)


def unpacked(state: Any) -> Any:
    """What :func:`packed` was given."""
    if isinstance(state, Mapping):
        if set(state) == {ARRAY}:
            return state[ARRAY].detach().cpu().numpy().copy()
        return {key: unpacked(value) for key, value in state.items()}
    return copy.deepcopy(state)

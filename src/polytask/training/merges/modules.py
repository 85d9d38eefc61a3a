"""From a state dict to a model that runs: a function of the user's, or a folder of transformers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from polytask.errors import InputError, MissingExtraError
from polytask.training.merges.lineage import State


def load_function(place: str, folder: Path) -> Callable[..., Any]:
    """The function that ``FILE.py:NAME`` stands for, a relative path being one within the folder.

    Raises:
        InputError: not of that form, no such file or name, a file that does not run.
    """
    path, sign, name = place.rpartition(":")
    source = folder / Path(path).expanduser()
    if not sign or source.suffix != ".py" or not source.is_file():
        raise InputError(f"{place!r} is not FILE.py:NAME with a file that exists in {folder}")
    spec = importlib.util.spec_from_file_location(f"polytask_user_{source.stem}", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(source.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{source} does not run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(source.parent))
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"{source} has no function called {name!r}")
    return found  # type: ignore[no-any-return]


def filled(model: Any, state: State) -> nn.Module:
    """The module with the weights of a state dict.

    Raises:
        InputError: it is no module, or the state dict is another architecture's.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the function that makes the model gave a {type(model).__name__}, not a torch module")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit the model: {' '.join(str(error).split())[:300]}") from None
    return model


def transformers_model(folder: Path, state: State) -> nn.Module:
    """The model that a folder's ``config.json`` describes, with the weights of a state dict.

    Raises:
        InputError: the folder has no configuration that names an architecture.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("a model given as a transformers folder", "transformers") from None
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        architecture = getattr(transformers, names[0])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise InputError(
            f"{folder} has no config.json that names an architecture of transformers: say  model: FILE.py:FUNCTION"
        ) from None
    config = transformers.AutoConfig.from_pretrained(folder)
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model = architecture.from_pretrained(None, config=config, state_dict=dict(state))
    finally:
        if shown:
            bars.enable_progress_bar()
    assert isinstance(model, nn.Module)
    return model

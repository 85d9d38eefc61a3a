"""Models of the Hugging Face hub by their names there, ``org/name`` or ``org/name@revision``: fetched once, then read from its cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from polytask.errors import InputError, MissingExtraError, StorageError
from polytask.merging.matching import Spec
from polytask.merging.safetensors_file import DTYPES

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm")
ELSEWHERE = ("*/*", "consolidated*")
"""Copies of the weights in other formats."""

T = TypeVar("T")


def on_hub(place: Path) -> bool:
    """Whether a place is the name of a model on the hub: nothing on this disk, and written as names are there."""
    return not place.exists() and NAME.fullmatch(str(place)) is not None


def fetched(place: Path) -> Path:
    """The folder of a model, of the hub's cache where it is one of the hub; what is there already is not fetched again.

    Args:
        place: a file or folder, which is left as it is, or a name on the hub.

    Raises:
        StorageError: the hub has no such model, or cannot be reached.
        InputError: the model asks for a licence to be accepted first.
        MissingExtraError: the package ``huggingface_hub`` is absent.
    """
    if not on_hub(place):
        return place
    hub, (repo, revision) = _library(place), _parts(place)

    def snapshot(*weights: str) -> Path:
        patterns = [*COMPANIONS, *weights]
        return Path(
            hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(ELSEWHERE))
        )

    folder = _asking(place, lambda: snapshot("*.safetensors"))
    if not any(folder.glob("*.safetensors")):
        folder = _asking(place, lambda: snapshot("*.bin"))
    return folder


def headers(place: Path) -> dict[str, Spec] | None:
    """Shapes and dtypes of a model on the hub from the headers of its files alone; None where that is not to be had.

    Raises:
        InputError: a dtype that cannot be read, a licence to be accepted.
        MissingExtraError: the package ``huggingface_hub`` is absent.
    """
    hub, (repo, revision) = _library(place), _parts(place)
    try:
        found = _asking(place, lambda: hub.get_safetensors_metadata(repo, revision=revision))
    except (hub.errors.NotASafetensorsRepoError, StorageError):
        return None  # an adapter, other formats, no connection: what is cached, or what is wrong, tells fetching
    specs: dict[str, Spec] = {}
    for file in found.files_metadata.values():
        for name, tensor in file.tensors.items():
            if tensor.dtype not in DTYPES:
                raise InputError(f"the tensor {name} of {place} has the dtype {tensor.dtype}, which cannot be read")
            specs[name] = Spec(tuple(tensor.shape), DTYPES[tensor.dtype])
    return specs


def _parts(place: Path) -> tuple[str, str | None]:
    found = NAME.fullmatch(str(place))
    assert found is not None
    return found["repo"], found["revision"]


def _library(place: Path) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError(f"there is no model at {place} on this disk; fetching it", "transformers") from None
    return huggingface_hub


def _asking(place: Path, ask: Callable[[], T]) -> T:
    """What the hub answers."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        raise InputError(
            f"the hub keeps {place} behind a licence: accept it there and log in with hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise StorageError(f"the hub has no revision {_parts(place)[1]} of {_parts(place)[0]}") from None
    except errors.RepositoryNotFoundError:
        raise StorageError(f"there is no model at {place}, neither on this disk nor on the hub") from None
    except errors.NotASafetensorsRepoError:
        raise
    except Exception as error:  # whatever stands between here and the hub may fail in its own way
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"there is no model at {place} on this disk, and the hub did not give one: {reason}"
        ) from None

"""The errors polytask raises for its users: one clear sentence, and the exit code a script can rely on."""

from __future__ import annotations


class PolytaskError(Exception):
    """Base of every error whose message is one sentence meant for the person at the keyboard.

    The command line prints the message alone and exits with :attr:`exit_code`.
    """

    exit_code = 1


class InputError(PolytaskError, ValueError):
    """The data, the arguments or a file given by the user cannot be used as they are (exit code 2)."""

    exit_code = 2


class TrainingError(PolytaskError, RuntimeError):
    """Training cannot go on: a non-finite loss or gradient, a diverged run (exit code 3)."""

    exit_code = 3


class MissingExtraError(PolytaskError, ImportError):
    """An optional dependency is needed; the message names the command that installs it (exit code 4)."""

    exit_code = 4

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: install it with  pip install 'polytask[{extra}]'")


class StorageError(PolytaskError, OSError):
    """A file cannot be written or read: full disk, missing rights, a truncated file (exit code 5)."""

    exit_code = 5

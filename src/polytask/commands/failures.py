"""What a person sees when a command cannot go on: one sentence, and an exit code that scripts can rely on."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from polytask.commands.console import err
from polytask.errors import PolytaskError, StorageError

EXIT_CODES = {
    0: "done",
    1: "unexpected error",
    2: "input cannot be used",
    3: "training failed",
    4: "optional dependency missing",
    5: "file cannot be read or written",
    130: "interrupted",
}
INTERRUPTED = 130


class Interrupted(PolytaskError):
    """The person pressed Ctrl-C; the message says what is kept and how to go on."""

    exit_code = INTERRUPTED


class OneSentence(TyperGroup):
    """The command group that turns every exception into one sentence; ``POLYTASK_DEBUG=1`` shows the traceback too."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise self._stop(Interrupted("interrupted")) from None
        except BrokenPipeError:  # whoever read our output has seen enough
            raise
        except (
            PolytaskError,
            OSError,
            MemoryError,
            ArithmeticError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            ValueError,
        ) as error:
            if type(error).__module__.startswith(
                ("typer", "click")
            ):  # usage errors, Exit and Abort are typer's own to show
                raise
            raise self._stop(error) from None

    def _stop(self, error: BaseException) -> typer.Exit:
        if os.environ.get("POLYTASK_DEBUG"):
            err().print("".join(traceback.format_exception(error)), markup=False, highlight=False)
        shown = in_one_sentence(error)
        err().print(f"Error: {shown}", style="red", markup=False, highlight=False, soft_wrap=True)
        return typer.Exit(shown.exit_code)


def in_one_sentence(error: BaseException) -> PolytaskError:
    """The same failure as an error whose message is meant for people."""
    if isinstance(error, PolytaskError):
        return error
    for link in _chain(error):
        if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(link):
            where = f" while writing {link.filename}" if isinstance(link, OSError) and link.filename else ""
            return StorageError(
                f"the disk is full{where}: free some space, then start again, fit and bench with --resume"
            )
    if isinstance(error, OSError) and error.filename:
        return StorageError(
            f"{error.filename} cannot be read or written: {(error.strerror or 'unknown reason').lower()}"
        )
    reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
    return PolytaskError(
        f"unexpected {type(error).__name__}{reason}, a defect of polytask; POLYTASK_DEBUG=1 shows where it arose"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""Every failure is one sentence and a documented exit code."""

from __future__ import annotations

import errno

import pytest

from polytask import errors, registry
from polytask.commands.failures import EXIT_CODES, in_one_sentence


@pytest.mark.parametrize("kind", [errors.InputError, errors.TrainingError, errors.StorageError])
def test_our_errors_pass_through(kind):
    error = kind("the column 'a' is odd")
    assert in_one_sentence(error) is error
    assert error.exit_code in EXIT_CODES


def test_a_full_disk_names_the_file():
    shown = in_one_sentence(OSError(errno.ENOSPC, "No space left on device", "run/model"))
    assert shown.exit_code == 5
    assert "the disk is full while writing run/model" in str(shown)


def test_a_full_disk_is_found_behind_another_error():
    error = RuntimeError("writing failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert in_one_sentence(error).exit_code == 5


def test_missing_rights_name_the_file():
    shown = in_one_sentence(PermissionError(errno.EACCES, "Permission denied", "/protected"))
    assert shown.exit_code == 5
    assert str(shown) == "/protected cannot be read or written: permission denied"


def test_a_defect_is_one_line_and_says_how_to_see_more(polytask, monkeypatch):
    def broken(family=None):
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.delenv("POLYTASK_DEBUG", raising=False)
    monkeypatch.setattr(registry, "methods", broken)
    result = polytask("methods")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "ZeroDivisionError (division by zero)" in result.stderr
    assert "POLYTASK_DEBUG=1" in result.stderr


def test_debug_shows_the_traceback(polytask, monkeypatch):
    def broken(family=None):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setenv("POLYTASK_DEBUG", "1")
    monkeypatch.setattr(registry, "methods", broken)
    result = polytask("methods")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "in broken" in result.stderr


def test_an_interrupt_ends_with_130(polytask, monkeypatch):
    def interrupted(family=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "methods", interrupted)
    result = polytask("methods")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_a_wrong_option_is_an_input_error(polytask):
    assert polytask("fit", "--no-such-option").exit_code == 2


def test_the_help_documents_every_exit_code(polytask):
    text = " ".join(polytask("--help").stdout.split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text.replace("│ ", "")
